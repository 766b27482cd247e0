"""The stages as Kubeflow's components call them: settings as JSON text, artifacts with metadata.

An artifact is a path and a dictionary, so nothing here imports kfp. The work of a stage is in
`reptile.stages`, and the graph that joins them is in `pipeline/`.
"""

import csv
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

from components import secrets
from components.fetch import fetch
from components.nodes import train_on_nodes
from components.push import publish as publish_bundle
from components.store import is_address, working_folder
from components.supervise import supervise
from reptile import stages
from reptile.data.dataset import PreparedData, load_prepared
from reptile.errors import InputError
from reptile.evaluate import evaluate as evaluate_checkpoint
from reptile.evaluate.gate import gate as judge
from reptile.evaluate.metrics import Metrics, Mode, Score, read_metrics
from reptile.evaluate.report.comparison import HEADLINE_MODE
from reptile.evaluate.write import metrics as metrics_of
from reptile.files import atomic_directory, sha256_file
from reptile.learn.checkpoint import INFO_FILE, Checkpoint, load_checkpoint
from reptile.learn.run_folder import run_folder
from reptile.learn.train import untrained
from reptile.objectives import objective_named
from reptile.provenance import settings_sha256
from reptile.settings import (
    BATCH_NORM_MODES,
    BatchNormMode,
    BesideSettings,
    EvaluateSettings,
    ExportSettings,
    GateSettings,
    PrepareSettings,
    Section,
    Settings,
    TrainSettings,
    VerifySettings,
    parse_settings,
    second_learner,
)

COMMIT_VARIABLE = "REPTILE_GIT_COMMIT"
"""Set in the project's image: the commit that it was built from."""
MOST_CLASSES = 100
"""Of a confusion matrix in Kubeflow: more cannot be read, and older backends refuse many more."""


class Artifact(Protocol):
    """The part of a KFP artifact that is used here."""

    path: str
    metadata: dict[str, Any]


class ConfusionMatrix(Artifact, Protocol):
    """KFP's ClassificationMetrics."""

    def log_confusion_matrix(self, categories: list[str], matrix: list[list[int]]) -> None:
        """Keep a confusion matrix, rows for the actual classes."""


class Point(NamedTuple):
    """Tasks to measure held-out scores on."""

    ways: int
    shots: int
    mode: BatchNormMode

    def __str__(self) -> str:
        return f"{self.ways}-way {self.shots}-shot {self.mode}"


def read_point(text: str) -> Point:
    """Read a point such as `3-way 1-shot frozen`.

    Raises:
        InputError: it is not written so.
    """
    found = re.fullmatch(rf"([1-9]\d*)-way ([1-9]\d*)-shot ({'|'.join(BATCH_NORM_MODES)})", text)
    if not found:
        modes = ", ".join(BATCH_NORM_MODES)
        raise InputError(f"point {text!r}: write it as `5-way 1-shot frozen`; modes are {modes}")
    mode = next(mode for mode in BATCH_NORM_MODES if mode == found[3])
    return Point(int(found[1]), int(found[2]), mode)


def prepare(
    settings: str,
    repository: str,
    revision: str,
    path: str,
    md5: str,
    git_commit: str,
    prepared: Artifact,
) -> None:
    """Fetch the data by DVC and make the prepared dataset of it.

    Args:
        settings: of `prepare`; its sources are relative to the repository's root.
        repository: address or folder of the repository that tracks the data.
        revision: of that repository.
        path: of the data in it.
        md5: of the data, as DVC knows it.
        git_commit: of the code that runs, "" for the commit that the image was built from; kept
            for lineage, here and in every artifact made from this one.
        prepared: the dataset to write.
    """
    chosen = parse_settings(PrepareSettings, settings)
    target = Path(prepared.path).absolute()
    with TemporaryDirectory(prefix="reptile-data-") as folder:
        fetch(repository, revision, path, md5, Path(folder))
        with chdir(folder):
            data = stages.prepare(chosen, target)
    prepared.metadata |= finite(
        {
            "data_repository": repository,
            "data_revision": revision,
            "data_path": path,
            "data_md5": md5,
            "git_commit": git_commit or os.environ.get(COMMIT_VARIABLE, ""),
            "dataset": data.name,
            "data_sha256": data.content_sha256,
            "splits_sha256": data.splits_sha256,
            "prepare_settings_sha256": _hash(chosen),
        }
    )


def check(
    train_settings: str,
    beside_settings: str,
    evaluate_settings: str,
    export_settings: str,
    verify_settings: str,
    prepared: Artifact,
) -> None:
    """Refuse, before training, what a later stage would refuse after it.

    Args:
        train_settings: of `train`.
        beside_settings: of `beside`, which may say that there is no second learner.
        evaluate_settings: of `evaluate`.
        export_settings: of `export`.
        verify_settings: of `verify`.
        prepared: the dataset.

    Raises:
        InputError: as `reptile.stages.check_later_stages` and `check_learner`.
    """
    settings = Settings(
        train=parse_settings(TrainSettings, train_settings),
        beside=parse_settings(BesideSettings, beside_settings),
        evaluate=parse_settings(EvaluateSettings, evaluate_settings),
        export=parse_settings(ExportSettings, export_settings),
        verify=parse_settings(VerifySettings, verify_settings),
    )
    data = Path(prepared.path)
    stages.check_later_stages(settings, data)
    stages.check_learner(settings, settings.train, data)
    if second := settings.beside.training:
        try:
            stages.check_learner(settings, second, data)
        except InputError as error:
            raise InputError(f"the second learner, of `beside`: {error}") from None


def train(
    settings: str,
    work: str,
    nodes: int,
    prepared: Artifact,
    checkpoint: Artifact,
    curves: Artifact,
    secret: Path = secrets.WORK,
) -> None:
    """Meta-train in a process of its own or on several nodes, started again if it dies.

    Args:
        settings: of `train`, or of `beside`, which may say that there is no second learner: then
            there is no checkpoint.
        work: folder or address of a store, for the checkpoints of unfinished training; this run
            goes on from the latest one that it has left there.
        nodes: pods to share the training among; more than one share the folder `work`.
        prepared: the dataset.
        checkpoint: the checkpoint to write.
        curves: the learning curves to write.
        secret: folder with the store's credentials.

    Raises:
        InputError: several nodes, and `work` is no folder that they share.
        SystemExit: training has failed for good, with its exit code.
    """
    if _no_learner(settings):
        text = "beside.algorithm = none: no second learner to train\n"
        for artifact in (checkpoint, curves):  # a store does not keep empty folders
            Path(artifact.path).mkdir(parents=True)
            (Path(artifact.path) / "none.txt").write_text(text, encoding="utf-8")
        print(text)
        return
    chosen = parse_settings(TrainSettings, settings)
    start = untrained(chosen, load_prepared(Path(prepared.path)))
    run = run_folder(Path(), start.info).name
    program = ("-m", "components.training", settings)
    if nodes > 1:
        if is_address(work):
            raise InputError(
                f"nodes = {nodes}: the nodes share data and checkpoint on a volume; set work to a "
                f"folder on it, not {work}"
            )
        shared = Path(work) / f"{run}.nodes"
        if not (shared / "prepared").is_dir():
            with atomic_directory(shared / "prepared") as copy:
                shutil.copytree(prepared.path, copy, dirs_exist_ok=True)
        places = [str(shared / name) for name in ("prepared", "checkpoint", "curves")]
        train_on_nodes(nodes, f"reptile-{run}", ["torchrun", *program, *places, work])
        for name, artifact in (("checkpoint", checkpoint), ("curves", curves)):
            shutil.copytree(shared / name, artifact.path)
        shutil.rmtree(shared)
    else:
        with working_folder(work, run, secret) as folder:
            places = [prepared.path, checkpoint.path, curves.path, str(folder)]
            supervise([sys.executable, *program, *places])
    info = load_checkpoint(Path(checkpoint.path)).info
    made = {
        "train_settings_sha256": _hash(chosen),
        "code_sha256": info.code_sha256,
        f"validation_{info.objective.metric}": info.curve[-1].score,
    }
    checkpoint.metadata |= _inherit(prepared) | finite(made)
    curves.metadata |= checkpoint.metadata


def evaluate(
    settings: str,
    points: Sequence[str],
    prepared: Artifact,
    checkpoint: Artifact,
    beside: Artifact,
    evaluation: Artifact,
    scores: Artifact,
    other_tasks: Artifact,
    confusion_matrix: ConfusionMatrix,
    report: Artifact,
) -> None:
    """Measure few-shot scores; show them, the confusion matrix and the report.

    Args:
        settings: of `evaluate`.
        points: other tasks to measure, such as `3-way 1-shot frozen`.
        prepared: the dataset.
        checkpoint: trained on it.
        beside: of the second learner, if there is one.
        evaluation: the folder of the evaluation; its metadata has every score as a number.
        scores: has no file; its metadata are the scores alone, for people.
        other_tasks: a table of the points, in Markdown.
        confusion_matrix: of the dataset with the fewest classes.
        report: a page for people.

    Raises:
        InputError: a point is not written as above.
    """
    chosen, others = parse_settings(EvaluateSettings, settings), [read_point(p) for p in points]
    folder = Path(evaluation.path)
    second = _second(beside)
    result = stages.evaluate(
        chosen,
        Path(prepared.path),
        Path(checkpoint.path),
        folder,
        beside=_named(second),
    )
    metrics = read_metrics(folder)
    lineage = _inherit(checkpoint) | {"evaluate_settings_sha256": _hash(chosen)}
    evaluation.metadata |= lineage | finite(metrics.flat())
    scores.metadata |= shown_scores(metrics)
    if (folder / "confusion.csv").is_file():  # a regressor has none
        categories, matrix = read_confusions(folder / "confusion.csv")
        if len(categories) <= MOST_CLASSES:
            confusion_matrix.log_confusion_matrix(categories, matrix)
        what = f"{result.fewest_classes}, {_tasks(metrics, metrics.fewest_shots, 'frozen')}"
        # Kubeflow's heading of the matrix.
        confusion_matrix.metadata |= lineage | {"display_name": what, "classes": len(categories)}
    shutil.copyfile(folder / "report.html", report.path)
    report.metadata |= lineage
    data, trained = load_prepared(Path(prepared.path)), load_checkpoint(Path(checkpoint.path))
    table = measure(others, chosen, data, trained, metrics)
    Path(other_tasks.path).write_text(table, encoding="utf-8")
    other_tasks.metadata |= lineage
    print(table)


def measure(
    points: Sequence[Point],
    settings: EvaluateSettings,
    data: PreparedData,
    trained: Checkpoint,
    metrics: Metrics,
) -> str:
    """Measure held-out scores at the points; return a table in Markdown.

    Points that the evaluation has measured are taken from it, and those that differ in the mode
    alone are measured together. A point that cannot be measured is a row that says why.

    Args:
        points: for as many ways as the checkpoint has, or fewer.
        settings: of the evaluation; its shots do not matter here.
        data: the dataset.
        trained: the checkpoint, trained on it.
        metrics: the evaluation's.
    """
    known: dict[tuple[int, int], Metrics | str] = {
        (metrics.ways, shots): metrics for shots in metrics.scores[metrics.held_out]
    }
    objective, rows = objective_named(metrics.objective), []
    for point in points:
        tasks = point.ways, point.shots
        if tasks not in known:
            known[tasks] = _measure(trained, data, settings, *tasks)
        found = known[tasks]
        if isinstance(found, str):
            rows.append([str(point), found, ""])
            continue
        scores = [
            objective.show(*found.score(found.held_out, point.shots, method, point.mode))
            for method in ("trained", "random")
        ]
        rows.append([str(point), *scores])
    unit = f", {objective.unit}" if objective.unit else ""
    title = f"{objective.title.capitalize()} on other tasks of {metrics.held_out}{unit}"
    how = f"± 95 % interval over {settings.tasks} tasks of held-out classes"
    if not rows:
        return "No other tasks were asked for.\n"
    table = _table(["tasks", "trained", "random initialisation"], rows)
    return "\n".join([f"## {title}", "", how, "", *table, ""])


def _measure(
    trained: Checkpoint, data: PreparedData, settings: EvaluateSettings, ways: int, shots: int
) -> Metrics | str:
    """Return the scores of tasks of so many ways and shots, or why there are none."""
    chosen = settings.model_copy(update={"shots": (shots,)})
    try:
        result = evaluate_checkpoint(chosen, trained, data, {}, ways=ways, baselines=False)
        return metrics_of(result)
    except InputError as error:
        return str(error)


def shown_scores(metrics: Metrics) -> dict[str, str]:
    """Return each score of the trained initialisation for people, under what it was measured on.

    Kubeflow sorts the names and shows the values as they are; `display_name` is its heading.
    """
    objective = objective_named(metrics.objective)
    unit = f", {objective.unit}" if objective.unit else ""
    return {
        "display_name": f"{objective.title}{unit}, ± 95 % interval",
    } | {
        f"{dataset}, {_tasks(metrics, shots, mode)}": objective.show(*score)
        for dataset, shots, method, mode, score in metrics.rows()
        if method == "trained" and mode in metrics.modes
    }


def gate(
    settings: str, champion: str, checkpoint: Artifact, evaluation: Artifact, verdict: Artifact
) -> str | None:
    """Judge whether the checkpoint may be exported; return why not, None if it may.

    Args:
        settings: of `export`, whose gate counts.
        champion: the text of an earlier bundle's manifest.json, or "".
        checkpoint: the challenger.
        evaluation: its evaluation.
        verdict: what was decided by which scores, in Markdown.
    """
    chosen = parse_settings(ExportSettings, settings)
    reason = judge(chosen.gate, Path(checkpoint.path), Path(evaluation.path), champion)
    lineage = _inherit(evaluation)
    text = _verdict(reason, chosen.gate, read_metrics(Path(evaluation.path)), lineage)
    Path(verdict.path).write_text(text, encoding="utf-8")
    verdict.metadata |= lineage
    return reason


def _verdict(
    reason: str | None, settings: GateSettings, metrics: Metrics, lineage: Mapping[str, Any]
) -> str:
    """Return the gate's decision for people: the scores, the limits, and what was judged."""
    objective = objective_named(metrics.objective)

    def score(shots: int, mode: Mode) -> str:
        found = metrics.score(metrics.held_out, shots, "trained", mode)
        return f"{objective.show(*found)} {objective.unit}".strip()

    shots = metrics.fewest_shots
    gated = _tasks(metrics, settings.shots, settings.mode)
    rows = [
        ["the gate goes by", gated, score(settings.shots, settings.mode)],
        [
            "the report's headline",
            _tasks(metrics, shots, HEADLINE_MODE),
            score(shots, HEADLINE_MODE),
        ],
    ]
    return "\n".join(
        [
            f"## {'Refused by the gate' if reason else 'Passed the gate'}",
            "",
            *([reason, ""] if reason else []),
            *_table(["", f"held-out tasks of {metrics.held_out}", objective.title], rows),
            "",
            f"Data at {lineage.get('data_revision') or 'no named revision'}, code at "
            f"{lineage.get('git_commit') or 'no named commit'}",
            "",
        ]
    )


def choose(checkpoints: Sequence[Artifact], best: Artifact, candidates: Artifact) -> None:
    """Keep the checkpoint of the best validation score; the test split is not looked at.

    Args:
        checkpoints: of training runs on the same data.
        best: a copy of the best, with its metadata.
        candidates: a table of all in Markdown, the best first, by the settings that differ.
    """
    trained = [(load_checkpoint(Path(each.path)).info, each) for each in checkpoints]
    objective = trained[0][0].objective
    ranked = sorted(  # of equal scores, the same whatever order they come in
        trained,
        key=lambda pair: (-objective.better * pair[0].curve[-1].score, _hash(pair[0].settings)),
    )
    source = ranked[0][1]
    shutil.copytree(source.path, best.path)
    best.metadata |= {k: v for k, v in source.metadata.items() if k != "display_name"}
    settings = [_flat(info.settings.model_dump(mode="json")) for info, _ in ranked]
    varied = [name for name in settings[0] if len({str(each[name]) for each in settings}) > 1]
    table = _table(
        [*varied, f"validation {objective.title}"],
        [
            [*(str(each[name]) for name in varied), f"{info.curve[-1].score:.4f}"]
            for each, (info, _) in zip(settings, ranked, strict=True)
        ],
    )
    text = "\n".join(
        [
            f"## {len(trained)} candidates, the best first",
            "",
            f"Chosen by the validation {objective.title} at the end of training; the test split "
            "was not used.",
            "",
            *table,
            "",
        ]
    )
    Path(candidates.path).write_text(text, encoding="utf-8")
    print(text)


def export(
    settings: str,
    prepared: Artifact,
    checkpoint: Artifact,
    beside: Artifact,
    evaluation: Artifact,
    bundle: Artifact,
    bundles: Artifact,
) -> None:
    """Write the ONNX bundle.

    Args:
        settings: of `export`.
        prepared: the dataset.
        checkpoint: of the learner that the gate judged.
        beside: of the second one, if there is one.
        evaluation: of both.
        bundle: that of the learner that validation tasks choose.
        bundles: those of both, in folders named after the algorithms.
    """
    chosen = parse_settings(ExportSettings, settings)
    folder = Path(bundle.path)
    stages.export(
        chosen,
        Path(prepared.path),
        Path(checkpoint.path),
        Path(evaluation.path),
        folder,
        beside=_second(beside),
        bundles=Path(bundles.path),
    )
    point = chosen.gate
    metrics = read_metrics(Path(evaluation.path))
    gated = metrics.score(metrics.held_out, point.shots, metrics.learner, point.mode)
    made = {
        "export_settings_sha256": _hash(chosen),
        "name": chosen.name,
        "manifest_sha256": sha256_file(folder / "manifest.json"),
        f"{metrics.held_out}, {_tasks(metrics, point.shots, point.mode)}": _shown(metrics, gated),
    }
    bundle.metadata |= _inherit(evaluation) | made
    bundles.metadata |= bundle.metadata


def verify(
    settings: str,
    prepared: Artifact,
    checkpoint: Artifact,
    beside: Artifact,
    bundle: Artifact,
    bundles: Artifact,
    verification: Artifact,
    checks: Artifact,
) -> str:
    """Check the bundle against eager PyTorch; return the SHA-256 of the manifest that passed.

    Args:
        settings: of `verify`.
        prepared: the dataset.
        checkpoint: what was exported.
        beside: of the second learner, if there is one.
        bundle: the bundle.
        bundles: those of all learners, of which it is one.
        verification: the report, as JSON.
        checks: the same as a table in Markdown.
    """
    chosen = parse_settings(VerifySettings, settings)
    report = stages.verify(
        chosen,
        Path(prepared.path),
        Path(checkpoint.path),
        Path(bundle.path),
        Path(verification.path),
        beside=_second(beside),
        bundles=Path(bundles.path),
    )
    made = {"verify_settings_sha256": _hash(chosen), "checks_passed": len(report["checks"])}
    verification.metadata |= _inherit(bundle) | made
    rows = [
        [each["name"], f"{each['measured']:.2g}", f"{each['limit']:.2g}"]
        for each in report["checks"]
    ]
    table = _table(["check", "largest difference", "limit"], rows)
    text = "\n".join(["## The bundle in ONNX Runtime compared with PyTorch", "", *table, ""])
    Path(checks.path).write_text(text, encoding="utf-8")
    checks.metadata |= verification.metadata
    return sha256_file(Path(bundle.path) / "manifest.json")


def publish(bundle: Artifact, remote: str, pointer: Artifact) -> None:
    """Push the bundle to a DVC remote; its .dvc file is the pointer."""
    publish_bundle(Path(bundle.path), remote, Path(pointer.path))
    pointer.metadata |= _inherit(bundle) | {
        "remote": remote,
        "manifest_sha256": bundle.metadata["manifest_sha256"],
    }


def read_confusions(path: Path) -> tuple[list[str], list[list[int]]]:
    """Read confusion.csv: the classes in their order, and how often each was taken for each."""
    with path.open(encoding="utf-8", newline="") as file:
        pairs = Counter((row["actual"], row["predicted"]) for row in csv.DictReader(file))
    categories = sorted({name for pair in pairs for name in pair})
    return categories, [[pairs[actual, guess] for guess in categories] for actual in categories]


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is not finite and say so: JSON, and so Kubeflow's store, has no NaN."""
    bad = sorted(k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v))
    kept = {name: value for name, value in values.items() if name not in bad}
    return kept | ({"not_finite": ", ".join(bad)} if bad else {})


# What passes from an artifact to those made from it; its scores and other hashes do not.
_LINEAGE = (
    "data_repository",
    "data_revision",
    "data_path",
    "data_md5",
    "git_commit",
    "dataset",
    "data_sha256",
    "splits_sha256",
    "code_sha256",
)


def _inherit(artifact: Artifact) -> dict[str, Any]:
    return {
        name: value
        for name, value in artifact.metadata.items()
        if name in _LINEAGE or name.endswith("_settings_sha256")
    }


def _no_learner(settings: str) -> bool:
    """Return whether these settings, JSON text of `beside`, train no second learner."""
    try:
        values = json.loads(settings)
    except ValueError:
        return False  # whoever reads them says what is wrong
    return isinstance(values, dict) and values.get("algorithm") == "none"


def _named(second: Path | None) -> dict[str, Path]:
    """Return the second learner's checkpoint, if there is one, by its method in the evaluation."""
    if second is None:
        return {}
    return {second_learner(load_checkpoint(second).info.settings.algorithm): second}


def _second(beside: Artifact) -> Path | None:
    """Return the second learner's checkpoint; None if there is none."""
    return Path(beside.path) if (Path(beside.path) / INFO_FILE).is_file() else None


def _hash(settings: Section) -> str:
    return settings_sha256(settings.model_dump(mode="json"))


def _tasks(metrics: Metrics, shots: int, mode: Mode) -> str:
    """Return the tasks of a score for people: `5-way 1-shot, frozen`."""
    return f"{metrics.ways}-way {shots}-shot, {mode}"


def _shown(metrics: Metrics, score: Score) -> str:
    objective = objective_named(metrics.objective)
    return f"{objective.title} {objective.show(*score)} {objective.unit}".strip()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under names such as `optimizer.learning_rate`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    cells = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]
