"""The gate: whether what was measured is good enough to be exported.

Not for measuring: see `measure`. What a bundle holds is `export`'s.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reptile.errors import GateError, InputError
from reptile.evaluate.metrics import read_metrics
from reptile.learn.checkpoint import load_checkpoint
from reptile.objectives import CLASSIFICATION, Objective, objective_scored
from reptile.settings import GateSettings


class Champion(NamedTuple):
    """The bundle that a new one must not be worse than, as its manifest.json describes it."""

    name: str
    ways: int
    dataset: str
    data_sha256: str
    splits_sha256: str
    metrics: dict[str, Any]


def read_champion(manifest: str) -> Champion:
    """Read the manifest.json of an earlier bundle, given as text.

    Raises:
        InputError: not a manifest.
    """
    try:
        values = json.loads(manifest)
        source = values["provenance"]
        return Champion(
            name=values["name"],
            ways=values["task"].get("ways", 1),
            dataset=source["dataset"],
            data_sha256=source["data_sha256"],
            splits_sha256=source["splits_sha256"],
            metrics=values["metrics"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the champion is not a bundle's manifest.json ({error}); give the whole file"
        ) from None


def gate(
    settings: GateSettings, checkpoint: Path, evaluation: Path, champion: str = ""
) -> str | None:
    """Say why a checkpoint may not be exported; None if it may.

    Args:
        settings: the floor, and which of the metrics counts.
        checkpoint: what was evaluated.
        evaluation: its evaluation.
        champion: the text of an earlier bundle's manifest.json, which the checkpoint must not be
            worse than; "" for none.

    Raises:
        InputError: the metric was not evaluated, or the champion was tested on other data.
    """
    info = load_checkpoint(checkpoint).info
    best = read_champion(champion) if champion else None
    if best:
        ours = info.settings.ways, info.dataset, info.data_sha256, info.splits_sha256
        if ours != (best.ways, best.dataset, best.data_sha256, best.splits_sha256):
            raise InputError(
                f"the champion {best.name} was tested on {best.ways}-way tasks of {best.dataset} "
                f"(data {best.data_sha256[:12]}, splits {best.splits_sha256[:12]}), the checkpoint "
                f"on {ours[0]}-way tasks of {ours[1]} (data {ours[2][:12]}, splits {ours[3][:12]}):"
                " their accuracies cannot be compared; name a champion of this data, or none"
            )
    return refusal(settings, info.dataset, read_metrics(evaluation), best and best.metrics)


def check_gate(settings: GateSettings, dataset: str, metrics: dict[str, Any]) -> None:
    """Refuse an evaluation below the gate."""
    reason = refusal(settings, dataset, metrics)
    if reason:
        raise GateError(f"{reason}; train longer, change export.gate, or export with --ignore-gate")


def refusal(
    settings: GateSettings,
    dataset: str,
    metrics: Mapping[str, Any],
    champion: Mapping[str, Any] | None = None,
) -> str | None:
    """Say why metrics do not pass the gate; None if they do. NaN never passes.

    Both limits are on the mean. Against a champion the 95 % intervals decide: only a checkpoint
    whose whole interval lies below the champion's is worse than it.

    Raises:
        InputError: the metric that the gate asks for is missing.
    """
    objective, score, interval, random = _gated(settings, dataset, metrics, "evaluated")
    above = objective.gain(score, random)
    what = f"{settings.shots}-shot {settings.mode} {objective.title} on {dataset}"
    worse, better = ("below", "above") if objective.better > 0 else ("above", "below")
    limit = settings.accuracy if objective is CLASSIFICATION else settings.mean_squared_error
    # Written as `not >=` because every comparison with NaN is false.
    if limit is not None and not objective.better * score >= objective.better * limit:
        return f"{what} is {score:.4f}, {worse} the gate of {limit}"
    if not above >= settings.above_random:
        return (
            f"{what} is {score:.4f}, only {above:.4f} {better} the random initialisation's; "
            f"the gate asks for {settings.above_random}"
        )
    if champion is not None:
        best = _gated(settings, dataset, champion, "measured for the champion")
        if not objective.better * score + interval >= objective.better * best.score - best.interval:
            return (
                f"{what} is {score:.4f} ± {interval:.4f}, wholly {worse} the "
                f"champion's {best.score:.4f} ± {best.interval:.4f}"
            )
    return None


class _Gated(NamedTuple):
    """The scores that the gate looks at."""

    objective: Objective
    score: float
    interval: float
    random: float


def _gated(settings: GateSettings, dataset: str, metrics: Mapping[str, Any], how: str) -> _Gated:
    try:
        scores = metrics[dataset][f"{settings.shots}-shot"][settings.mode]
        objective = objective_scored(scores)
        names = objective.metric, "interval", f"random_{objective.metric}"
        return _Gated(objective, *(float(scores[name]) for name in names))
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"the gate asks for {settings.shots}-shot {settings.mode} on {dataset}, which was not "
            f"{how}; change export.gate or evaluate.shots"
        ) from None
