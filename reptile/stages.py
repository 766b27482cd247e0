"""The five stages, as DVC, Kubeflow and the command line all call them.

Each is one function: settings and input folders in, one output folder out, written whole or not at
all. What a stage does lies in the room of its name; this is only where the rooms are joined.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reptile.data.dataset import PreparedData, load_cross_domain, load_prepared
from reptile.data.prepare import prepare as prepare_data
from reptile.errors import InputError
from reptile.evaluate import Evaluation, write_evaluation
from reptile.evaluate import evaluate as evaluate_checkpoint
from reptile.evaluate.write import metrics
from reptile.experiments.transfer import transfer as transfer_checkpoints
from reptile.experiments.transfer import transfer_json, transfer_markdown
from reptile.export.verify import verify_bundle
from reptile.export.write import export_bundle
from reptile.files import atomic_directory, write_json
from reptile.learn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from reptile.learn.curves import CurveWriter
from reptile.learn.distributed import join
from reptile.learn.train import Progress, choose_device, run_folder
from reptile.learn.train import train as meta_train
from reptile.objectives import CLASSIFICATION, Kind, kind_of, kind_scored
from reptile.settings import (
    BatchNormMode,
    EvaluateSettings,
    ExportSettings,
    GateSettings,
    PrepareSettings,
    TrainSettings,
    VerifySettings,
)

Counted = Callable[[int, int], None]
"""Told how many of how many are done."""


def prepare(
    settings: PrepareSettings, prepared: Path, on_progress: Counted | None = None
) -> PreparedData:
    """Make the prepared dataset from its source."""
    return prepare_data(settings, prepared, on_progress)


def train(
    settings: TrainSettings,
    prepared: Path,
    checkpoint: Path,
    *,
    curves: Path,
    work: Path,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Checkpoint:
    """Meta-train on the prepared data; write the checkpoint and, as it goes, the curves.

    `work` holds unfinished runs, so that `resume` can go on from them. Started by torchrun, the
    processes share the work, and the first alone writes.
    """
    with join(choose_device(settings.device)) as processes:
        data = load_prepared(prepared)
        if not processes.first:
            return meta_train(settings, data, work, resume=resume, processes=processes)
        with CurveWriter(curves, kind_of(data.values)) as writer:

            def observe(progress: Progress) -> None:
                writer.write(progress.curve)
                on_progress(progress)

            result = meta_train(
                settings, data, work, resume=resume, processes=processes, on_progress=observe
            )
            writer.write(result.info.curve)
        save_checkpoint(checkpoint, result)
        shutil.rmtree(run_folder(work, result.info), ignore_errors=True)
        return result


def evaluate(
    settings: EvaluateSettings,
    prepared: Path,
    checkpoint: Path,
    evaluation: Path,
    on_progress: Counted | None = None,
) -> Evaluation:
    """Measure few-shot scores on held-out classes and on the cross-domain data."""
    trained = load_checkpoint(checkpoint)
    data = load_prepared(prepared)
    check_same_data(trained, data)
    result = evaluate_checkpoint(settings, trained, data, load_cross_domain(prepared), on_progress)
    with atomic_directory(evaluation) as folder:
        write_evaluation(result, folder)
    return result


def measure(
    settings: EvaluateSettings, prepared: Path, checkpoint: Path, ways: int
) -> dict[str, Any]:
    """Measure accuracy on held-out classes in tasks of so many ways; return it as metrics.json."""
    trained = load_checkpoint(checkpoint)
    data = load_prepared(prepared)
    check_same_data(trained, data)
    return metrics(evaluate_checkpoint(settings, trained, data, {}, ways=ways))


def transfer(
    settings: EvaluateSettings,
    runs: Sequence[Path],
    datasets: Sequence[Path],
    output: Path,
    mode: BatchNormMode = "transductive",
    on_progress: Counted | None = None,
) -> str:
    """Test the checkpoint of every run on the data of every run; return the table as Markdown.

    Args:
        settings: the protocol.
        runs: artifacts folders, each with `checkpoint` and `prepared`.
        datasets: further prepared folders, to test on only.
        output: folder for transfer.json, with everything, and transfer.md.
        mode: batch norm in the Markdown.
        on_progress: told how many of how many adaptations are done.
    """
    checkpoints: dict[str, Checkpoint] = {}
    columns: dict[str, PreparedData] = {}
    for run in runs:
        checkpoint = load_checkpoint(run / "checkpoint")
        checkpoints[_name(checkpoint.info.dataset, run, checkpoints)] = checkpoint
    for folder in (*(run / "prepared" for run in runs), *datasets):
        data = load_prepared(folder)
        if not any(data.index == other.index for other in columns.values()):
            columns[_name(data.name, folder, columns)] = data
    found = transfer_checkpoints(settings, checkpoints, columns, on_progress)
    text = transfer_markdown(found, mode)
    with atomic_directory(output) as temporary:
        write_json(temporary / "transfer.json", transfer_json(found))
        (temporary / "transfer.md").write_text(text, encoding="utf-8")
    return text


def _name(name: str, folder: Path, taken: Collection[str]) -> str:
    """Return a name for people that no other has."""
    return f"{name} ({folder})" if name in taken else name


def export(
    settings: ExportSettings,
    prepared: Path,
    checkpoint: Path,
    evaluation: Path,
    bundle: Path,
    *,
    ignore_gate: bool = False,
) -> None:
    """Write the ONNX bundle of a checkpoint whose evaluation passes the gate."""
    metrics = read_metrics(evaluation)
    protocol = EvaluateSettings.model_validate(_read_json(evaluation / "settings.json"))
    trained = load_checkpoint(checkpoint)
    data = load_prepared(prepared)
    check_same_data(trained, data)
    if not ignore_gate:
        check_gate(settings.gate, data.name, metrics)
    export_bundle(settings, trained, data, metrics, bundle, protocol=protocol)


def verify(
    settings: VerifySettings,
    prepared: Path,
    checkpoint: Path,
    bundle: Path,
    verification: Path,
) -> dict[str, Any]:
    """Check the bundle against eager PyTorch; write the report, then fail if any check did.

    Raises:
        InputError: a check failed; the report at `verification` says which and by how much.
    """
    trained = load_checkpoint(checkpoint)
    data = load_prepared(prepared)
    check_same_data(trained, data)
    report = verify_bundle(settings, bundle, trained, data)
    write_json(verification, report)
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    if failed:
        raise InputError(f"{bundle} failed {', '.join(failed)}; see {verification}")
    return report


def check_same_data(checkpoint: Checkpoint, data: PreparedData) -> None:
    """Refuse data other than the checkpoint was trained on: its held-out classes are not ours."""
    info = checkpoint.info
    if (info.data_sha256, info.splits_sha256) != (data.content_sha256, data.splits_sha256):
        raise InputError(
            f"the checkpoint was trained on {info.dataset} with data {info.data_sha256[:12]} and "
            f"splits {info.splits_sha256[:12]}, the prepared data has {data.content_sha256[:12]} "
            f"and {data.splits_sha256[:12]}; run `reptile train` again"
        )


def read_metrics(evaluation: Path) -> dict[str, Any]:
    """Read metrics.json of an evaluation folder."""
    return _read_json(evaluation / "metrics.json")


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
        raise InputError(
            f"{reason}; train longer, change export.gate, or export with --ignore-gate"
        )


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
    kind, score, interval, random = _gated(settings, dataset, metrics, "evaluated")
    above = kind.gain(score, random)
    what = f"{settings.shots}-shot {settings.mode} {kind.title} on {dataset}"
    worse, better = ("below", "above") if kind.better > 0 else ("above", "below")
    limit = settings.accuracy if kind is CLASSIFICATION else settings.mean_squared_error
    # Written as `not >=` because every comparison with NaN is false.
    if limit is not None and not kind.better * score >= kind.better * limit:
        return f"{what} is {score:.4f}, {worse} the gate of {limit}"
    if not above >= settings.above_random:
        return (
            f"{what} is {score:.4f}, only {above:.4f} {better} the random initialisation's; "
            f"the gate asks for {settings.above_random}"
        )
    if champion is not None:
        best = _gated(settings, dataset, champion, "measured for the champion")
        if not kind.better * score + interval >= kind.better * best.score - best.interval:
            return (
                f"{what} is {score:.4f} ± {interval:.4f}, wholly {worse} the "
                f"champion's {best.score:.4f} ± {best.interval:.4f}"
            )
    return None


class _Gated(NamedTuple):
    """The scores that the gate looks at."""

    kind: Kind
    score: float
    interval: float
    random: float


def _gated(settings: GateSettings, dataset: str, metrics: Mapping[str, Any], how: str) -> _Gated:
    try:
        scores = metrics[dataset][f"{settings.shots}-shot"][settings.mode]
        kind = kind_scored(scores)
        names = kind.metric, "interval", f"random_{kind.metric}"
        return _Gated(kind, *(float(scores[name]) for name in names))
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"the gate asks for {settings.shots}-shot {settings.mode} on {dataset}, which was not "
            f"{how}; change export.gate or evaluate.shots"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run `reptile evaluate` first") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); run `reptile evaluate` again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a JSON object; run `reptile evaluate` again")
    return dict(values)
