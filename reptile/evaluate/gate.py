"""The gate: whether an evaluation is good enough for export.

Four questions, all about held-out classes at `export.gate.shots` and `.mode`: is the score above
the limit, is it enough above the untrained start, is it no worse than the champion's, and does no
simpler method beat it on the same tasks. The last one is asked of every method measured on this
checkpoint or on the raw input; another network trained beside is a recommendation in the report,
no reason to refuse.
"""

import json
from pathlib import Path
from typing import NamedTuple

from reptile.errors import GateError, InputError
from reptile.evaluate.methods import title
from reptile.evaluate.metrics import Metrics, Score, read_metrics, upgrade
from reptile.learn.checkpoint import load_checkpoint
from reptile.objectives import objective_named
from reptile.settings import GateSettings


class Champion(NamedTuple):
    """The bundle that a new one must not be worse than, as its manifest.json describes it."""

    name: str
    data_sha256: str
    splits_sha256: str
    metrics: Metrics


def read_champion(manifest: str) -> Champion:
    """Read the manifest.json of an earlier bundle, of any format, given as text.

    Raises:
        InputError: not a manifest.
    """
    try:
        values = json.loads(manifest)
        source, metrics = values["provenance"], values["metrics"]
        return Champion(
            name=values["name"],
            data_sha256=source["data_sha256"],
            splits_sha256=source["splits_sha256"],
            metrics=(
                upgrade(metrics, values["task"].get("ways", 1), source["dataset"])
                if values["format"] == 1
                else Metrics.model_validate(metrics)
            ),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the champion is not a bundle's manifest.json ({' '.join(str(error).split())}); give "
            "the whole file"
        ) from None


def gate(
    settings: GateSettings, checkpoint: Path, evaluation: Path, champion: str = ""
) -> str | None:
    """Return why a checkpoint may not be exported; None if it may.

    Args:
        settings: the limits, and the score to compare.
        checkpoint: what was evaluated.
        evaluation: its evaluation.
        champion: the text of an earlier bundle's manifest.json, which the checkpoint must not be
            worse than; "" for none.

    Raises:
        InputError: the score was not measured, or the champion was tested on other data.
    """
    info, metrics = load_checkpoint(checkpoint).info, read_metrics(evaluation)
    best = read_champion(champion) if champion else None
    if best:
        here = metrics.ways, metrics.held_out, info.data_sha256, info.splits_sha256
        there = best.metrics.ways, best.metrics.held_out, best.data_sha256, best.splits_sha256
        if here != there:
            raise InputError(
                f"the champion {best.name} was tested on {there[0]}-way tasks of {there[1]} "
                f"(data {there[2][:12]}, splits {there[3][:12]}), the checkpoint on "
                f"{here[0]}-way tasks of {here[1]} (data {here[2][:12]}, splits {here[3][:12]}): "
                "their scores cannot be compared; name a champion of this data, or none"
            )
    return refusal(settings, metrics, best and best.metrics)


def check_gate(settings: GateSettings, metrics: Metrics) -> None:
    """Refuse an evaluation below the gate.

    Raises:
        GateError: it is.
    """
    reason = refusal(settings, metrics)
    if reason:
        raise GateError(f"{reason}; train longer, change export.gate, or export with --ignore-gate")


def refusal(
    settings: GateSettings, metrics: Metrics, champion: Metrics | None = None
) -> str | None:
    """Return why metrics do not pass the gate; None if they do. NaN never passes.

    Both limits are on the mean of the checkpoint's learner. Against a champion the 95 % intervals
    decide, of the learner that would be exported: the choice on validation tasks, which may be one
    beside. It is worse only if its whole interval lies below the champion's. Against simpler
    methods the interval of the paired differences decides; `insist` skips them.

    Raises:
        InputError: the score that the gate needs was not measured.
    """
    objective = objective_named(metrics.objective)
    learner = _gated(settings, metrics, metrics.learner, "evaluated")
    random = _gated(settings, metrics, "random", "evaluated")
    gain, sign = objective.gain(learner.mean, random.mean), objective.better
    what = f"{settings.shots}-shot {settings.mode} {objective.title} on {metrics.held_out}"
    worse, better = ("below", "above") if sign > 0 else ("above", "below")
    limit: float | None = getattr(settings, objective.metric)
    # Written as `not >=` because every comparison with NaN is false.
    if limit is not None and not sign * learner.mean >= sign * limit:
        return f"{what} is {learner.mean:.4f}, {worse} the gate of {limit}"
    if not gain >= settings.above_random:
        return (
            f"{what} is {learner.mean:.4f}, only {gain:.4f} {better} the random "
            f"initialisation's; the gate requires {settings.above_random}"
        )
    if champion is not None:
        best = _gated(settings, champion, champion.learner, "measured for the champion")
        # The bundle would be that of the best learner, as the champion's was.
        method = metrics.best_of([metrics.learner, *metrics.beside])
        new = _gated(settings, metrics, method, "evaluated")
        if not sign * new.mean + new.interval >= sign * best.mean - best.interval:
            by = "" if method == metrics.learner else f" by {title(method)} ({method})"
            return (
                f"{what}{by} is {new.mean:.4f} ± {new.interval:.4f}, wholly {worse} the "
                f"champion's {best.mean:.4f} ± {best.interval:.4f}"
            )
    beaten = None if settings.insist else strongest(settings, metrics)
    if beaten:
        method, difference = beaten
        instead = (
            f" (evaluate.learner: {method} takes it)" if method in ("prototypes", "ridge") else ""
        )
        return (
            f"{what} is {learner.mean:.4f}, but a simpler method is better on the same tasks: "
            f"{title(method)} ({method}), by {abs(difference.mean):.4f} ± "
            f"{difference.interval:.4f}{instead}. To export nevertheless, set "
            "export.gate.insist to true"
        )
    return None


def strongest(settings: GateSettings, metrics: Metrics) -> tuple[str, Score] | None:
    """Return the method that beats the learner beyond its interval by most, and the difference.

    Checkpoints measured beside do not count.
    """
    sign = objective_named(metrics.objective).better
    found = metrics.differences.get(metrics.held_out, {}).get(settings.shots, {})
    beating = {
        method: difference
        for method, by_mode in found.items()
        if method not in metrics.beside
        and (difference := by_mode.get(settings.mode, by_mode.get("none")))
        and sign * difference.mean > difference.interval
    }
    if not beating:
        return None
    method = max(beating, key=lambda name: sign * beating[name].mean)
    return method, beating[method]


def _gated(settings: GateSettings, metrics: Metrics, method: str, how: str) -> Score:
    score = metrics.find(metrics.held_out, settings.shots, method, settings.mode)
    if score is None:
        raise InputError(
            f"the gate needs {settings.shots}-shot {settings.mode} on {metrics.held_out}, which "
            f"was not {how}; change export.gate or evaluate.shots"
        )
    return score
