"""The five stages, as DVC, Kubeflow and the command line call them.

Each is one function: settings and input folders in, one output folder out, complete or not at all.
The work is in the package of the stage's name; this module only connects them. Each function
imports what it runs, so that reptile.provenance can determine what each result depends on.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from reptile.errors import InputError, VerificationError
from reptile.files import atomic_directory, lock_folder, write_json
from reptile.settings import (
    EvaluateSettings,
    ExportSettings,
    PrepareSettings,
    Settings,
    TrainSettings,
    VerifySettings,
    second_learner,
)

if TYPE_CHECKING:
    from reptile.data.dataset import PreparedData
    from reptile.evaluate import Evaluation
    from reptile.learn.checkpoint import Checkpoint
    from reptile.learn.train import Progress

MEASURED_FILE = "checkpoints.json"
"""In an evaluation: the hashes of the checkpoints that it measured, by name."""
Counted = Callable[[int, int], None]
"""Called with the number done and the total."""


def check_later_stages(settings: Settings, prepared: Path) -> None:
    """Refuse, before training, what a later stage would refuse after it.

    Raises:
        InputError: the test split cannot make the tasks of `evaluate` and `verify`, or the learner
            cannot learn them, the gate and the bundle need what `evaluate` does not measure, or the
            adaptation of the network cannot be written as a graph.
    """
    from reptile.data.dataset import load_prepared
    from reptile.objectives import objective_of
    from reptile.tasks import check_classes, check_ways

    data = load_prepared(prepared)
    test, evaluation, gate = data.split("test"), settings.evaluate, settings.export.gate
    ways = evaluation.task_ways(settings.train, len(test.starts))
    objective = objective_of(data.values)
    objective.check_ways(settings.train.ways, data.name)
    check_ways(settings.train, objective.least_ways, ways)
    rows = {"prototypes": "protonet", "ridge": "ridge"}
    if (of_row := rows.get(evaluation.learner)) and (data.values or settings.train.head == of_row):
        raise InputError(
            f"evaluate.learner = {evaluation.learner}: `reptile evaluate` has no such row for "
            f"{settings.train.algorithm} on {data.name}; use trained"
        )
    images = max(evaluation.shots) + evaluation.queries
    what = f"test split of {data.name}"
    check_classes(test, ways, images, f"{what}, for `reptile evaluate`")
    queries = objective.validation.queries
    check_classes(test, ways, settings.verify.shots + queries, f"{what}, for `reptile verify`")
    if gate.mean_squared_error is not None and not data.values:
        raise InputError(
            f"export.gate.mean_squared_error = {gate.mean_squared_error:g}: {data.name} has "
            "classes, and no values; set export.gate.accuracy"
        )
    if gate.shots not in evaluation.shots:
        shots = ", ".join(map(str, evaluation.shots))
        raise InputError(
            f"export.gate.shots = {gate.shots}: `reptile evaluate` measures {shots}-shot only; "
            "change export.gate.shots or evaluate.shots"
        )
    if not settings.train.closed_form and settings.export.max_steps < evaluation.steps:
        raise InputError(
            f"export.max_steps = {settings.export.max_steps} is below evaluate.steps = "
            f"{evaluation.steps}; raise one or lower the other"
        )
    if settings.train.model.is_module and not settings.train.closed_form:
        from reptile.export.check import check_export
        from reptile.learn.train import untrained

        if problems := check_export(untrained(settings.train, data).model):
            raise InputError("; ".join(problems))


def check_learner(settings: Settings, training: TrainSettings, prepared: Path) -> None:
    """As `check_later_stages`, for one of the learners, with what takes its network to know.

    Raises:
        InputError: it cannot be trained, also not on a part of a cross-validation, it cannot learn
            the tasks of `evaluate`, or its bundle cannot have so large a support set.
    """
    from reptile.data.dataset import load_prepared
    from reptile.evaluate.folds import parts
    from reptile.export.closed_form import check_support
    from reptile.learn.train import check_tasks, untrained
    from reptile.tasks import check_ways

    data, evaluation = load_prepared(prepared), settings.evaluate
    info = untrained(training, data).info
    ways = evaluation.task_ways(settings.train, len(data.split("test").starts))
    check_ways(training, info.objective.least_ways, ways)
    if evaluation.folds:
        for part in parts(data, evaluation.folds, evaluation.seed):
            check_tasks(training, part, f"evaluate.folds = {evaluation.folds}: training split")
    row = "ridge" if evaluation.learner == "auto" else evaluation.learner
    for algorithm in (training.algorithm, row):
        check_support(algorithm, settings.export.max_support)


def prepare(
    settings: PrepareSettings, prepared: Path, on_progress: Counted | None = None
) -> "PreparedData":
    """Make the prepared dataset from its source."""
    from reptile.data.prepare import prepare as prepare_data

    return prepare_data(settings, prepared, on_progress)


def train(
    settings: TrainSettings,
    prepared: Path,
    checkpoint: Path,
    *,
    curves: Path,
    work: Path,
    resume: bool = False,
    on_progress: "Callable[[Progress], None]" = lambda progress: None,
    stop: Callable[[], int] = lambda: 0,
) -> "Checkpoint":
    """Meta-train on the prepared data; write the checkpoint and, as it goes, the curves.

    `work` holds unfinished runs, so that `resume` can continue them. Started by torchrun, the
    processes share the work, and only the first writes. A second training that would write to the
    same folder is refused while this one runs. `stop` is that of
    `reptile.learn.run.run_training`.
    """
    from reptile.data.dataset import load_prepared
    from reptile.learn.checkpoint import save_checkpoint
    from reptile.learn.curves import CurveWriter
    from reptile.learn.distributed import join
    from reptile.learn.engines import choose_device
    from reptile.learn.run import run_training
    from reptile.learn.run_folder import remove, run_folder
    from reptile.objectives import objective_of

    with join(choose_device(settings.device)) as processes:
        data = load_prepared(prepared)
        if not processes.first:
            return run_training(settings, data, work, resume=resume, processes=processes, stop=stop)
        with lock_folder(checkpoint.parent):
            with CurveWriter(curves, objective_of(data.values)) as writer:

                def observe(progress: "Progress") -> None:
                    writer.write(progress.curve)
                    on_progress(progress)

                result = run_training(
                    settings,
                    data,
                    work,
                    resume=resume,
                    processes=processes,
                    on_progress=observe,
                    stop=stop,
                )
                writer.write(result.info.curve)
            save_checkpoint(checkpoint, result)
            remove(run_folder(work, result.info))
        return result


def evaluate(
    settings: EvaluateSettings,
    prepared: Path,
    checkpoint: Path,
    evaluation: Path,
    on_progress: Counted | None = None,
    beside: Mapping[str, Path] | None = None,
) -> "Evaluation":
    """Measure few-shot scores on held-out classes and on the cross-domain data.

    Checkpoints `beside`, by name, are measured on the same tasks.
    """
    from reptile.data.dataset import load_cross_domain, load_prepared
    from reptile.evaluate import evaluate as evaluate_checkpoint
    from reptile.evaluate import write_evaluation
    from reptile.learn.checkpoint import checkpoint_sha256, load_checkpoint

    trained = load_checkpoint(checkpoint)
    data = load_prepared(prepared)
    trained.info.check_data(data)
    others = {name: load_checkpoint(folder) for name, folder in (beside or {}).items()}
    cross_domain = load_cross_domain(prepared)
    measured = {"trained": checkpoint, **(beside or {})}
    hashes = {name: checkpoint_sha256(folder) for name, folder in measured.items()}
    result = evaluate_checkpoint(settings, trained, data, cross_domain, on_progress, beside=others)
    with atomic_directory(evaluation) as folder:
        write_evaluation(result, folder)
        write_json(folder / MEASURED_FILE, hashes)
    return result


def export(
    settings: ExportSettings,
    prepared: Path,
    checkpoint: Path,
    evaluation: Path,
    bundle: Path,
    *,
    beside: Path | None = None,
    bundles: Path | None = None,
    ignore_gate: bool = False,
) -> None:
    """Write the ONNX bundle of a checkpoint whose evaluation passes the gate.

    With the second learner's checkpoint `beside`, the bundle is that of the learner that validation
    tasks choose; the bundles of both are in `bundles`, in folders named after the algorithms.
    """
    from reptile.data.dataset import load_prepared
    from reptile.evaluate.gate import check_gate
    from reptile.evaluate.metrics import read_json, read_metrics
    from reptile.export.write import export_bundles
    from reptile.learn.checkpoint import load_checkpoint
    from reptile.learn.unadapted import exported

    metrics = read_metrics(evaluation)
    protocol = EvaluateSettings.model_validate(read_json(evaluation / "settings.json"))
    trained = load_checkpoint(checkpoint)
    data = load_prepared(prepared)
    trained.info.check_data(data)
    _check_measured(evaluation, "trained", checkpoint)
    if not ignore_gate:
        check_gate(settings.gate, metrics)
    learners = {metrics.learner: exported(trained, data, metrics.model_dump(mode="json"))}
    if beside:
        second = load_checkpoint(beside)
        second.info.check_data(data)
        name = second_learner(second.info.settings.algorithm)
        _check_measured(evaluation, name, beside)
        learners[name] = second
    with TemporaryDirectory() as folder:
        all_bundles = bundles or Path(folder) / "bundles"
        export_bundles(settings, learners, data, metrics, all_bundles, bundle, protocol=protocol)


def _check_measured(evaluation: Path, name: str, checkpoint: Path) -> None:
    """Refuse an evaluation of another checkpoint: its scores would pass the gate for this one.

    Raises:
        InputError: the checkpoint was trained again since.
    """
    from reptile.evaluate.metrics import read_json
    from reptile.learn.checkpoint import checkpoint_sha256

    if not (evaluation / MEASURED_FILE).is_file():  # of an earlier version
        return
    measured = read_json(evaluation / MEASURED_FILE).get(name)
    if measured not in (None, checkpoint_sha256(checkpoint)):
        raise InputError(
            f"{evaluation}: measured another checkpoint than {checkpoint}; run `reptile evaluate` "
            "again"
        )


def verify(
    settings: VerifySettings,
    prepared: Path,
    checkpoint: Path,
    bundle: Path,
    verification: Path,
    *,
    beside: Path | None = None,
    bundles: Path | None = None,
) -> dict[str, Any]:
    """Check the bundle against eager PyTorch; write the report, then fail if any check did.

    With `beside` and `bundles`, as for `export`, each learner's bundle is checked, and that
    `bundle` is one of them.

    Raises:
        VerificationError: a check failed; the report at `verification` says which and by how much.
    """
    from reptile.data.dataset import load_prepared
    from reptile.export.verify import read_manifest, verify_bundle, verify_bundles
    from reptile.learn.checkpoint import load_checkpoint
    from reptile.learn.unadapted import exported

    trained = load_checkpoint(checkpoint)
    data = load_prepared(prepared)
    trained.info.check_data(data)
    others = {}
    if beside:
        second = load_checkpoint(beside)
        others[second_learner(second.info.settings.algorithm)] = second
    # Not what systems leave in folders, such as .DS_Store.
    folders = [*bundles.glob("[!.]*/")] if bundles else [bundle]
    each = [read_manifest(folder).raw.get("metrics") for folder in sorted(folders)]
    firsts = [values for values in each if not values or values["learner"] not in others]
    if not firsts:
        raise InputError(
            f"{bundles}: no bundle of the first learner; run `reptile export` with these settings"
        )
    metrics = firsts[0]
    trained = exported(trained, data, metrics)
    if bundles:
        learners = {metrics["learner"] if metrics else "trained": trained} | others
        report = verify_bundles(settings, bundles, bundle, learners, data)
    else:
        report = verify_bundle(settings, bundle, trained, data)
    write_json(verification, report)
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    if failed:
        where = bundles or bundle
        raise VerificationError(f"{where} failed {', '.join(failed)}; see {verification}")
    return report
