"""The stages as Kubeflow's components call them: settings as JSON text, artifacts with metadata.

An artifact is a path and a dictionary, so nothing here imports kfp. What a stage does is `stages`'
business, and the graph that joins them is in `pipeline/`.
"""

import csv
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
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
from reptile.data.dataset import load_prepared
from reptile.errors import InputError
from reptile.evaluate import evaluate as evaluate_checkpoint
from reptile.evaluate.gate import gate as judge
from reptile.evaluate.metrics import read_metrics
from reptile.evaluate.write import metrics
from reptile.files import atomic_directory, sha256_file
from reptile.learn.checkpoint import load_checkpoint
from reptile.learn.run_folder import run_folder
from reptile.learn.train import untrained
from reptile.objectives import objective_named
from reptile.provenance import settings_sha256
from reptile.settings import (
    BATCH_NORM_MODES,
    EvaluateSettings,
    ExportSettings,
    PrepareSettings,
    Section,
    TrainSettings,
    VerifySettings,
    parse_settings,
)


class Artifact(Protocol):
    """What of a KFP artifact is used here."""

    path: str
    metadata: dict[str, Any]


class ConfusionMatrix(Artifact, Protocol):
    """KFP's ClassificationMetrics."""

    def log_confusion_matrix(self, categories: list[str], matrix: list[list[int]]) -> None:
        """Keep a confusion matrix, rows for the actual classes."""


class Verdict(NamedTuple):
    """Whether a checkpoint may be exported, and if not, why."""

    passed: bool
    reason: str


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
        git_commit: of the code that runs; kept for lineage, here and in all that comes of it.
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
            "git_commit": git_commit,
            "dataset": data.name,
            "data_sha256": data.content_sha256,
            "splits_sha256": data.splits_sha256,
            "prepare_settings_sha256": _hash(chosen),
        }
    )


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
        settings: of `train`.
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
    own = {
        "train_settings_sha256": _hash(chosen),
        "code_sha256": info.code_sha256,
        f"validation_{info.objective.metric}": info.curve[-1].score,
        info.objective.metric: info.curve[-1].score,
    }
    checkpoint.metadata |= _inherit(prepared) | finite(own)
    curves.metadata |= checkpoint.metadata


def evaluate(
    settings: str,
    prepared: Artifact,
    checkpoint: Artifact,
    evaluation: Artifact,
    confusion: ConfusionMatrix,
    report: Artifact,
) -> None:
    """Measure few-shot accuracy; show the scores, the confusion matrix and the report."""
    chosen = parse_settings(EvaluateSettings, settings)
    folder = Path(evaluation.path)
    stages.evaluate(chosen, Path(prepared.path), Path(checkpoint.path), folder)
    metrics = read_metrics(folder)
    # Of the held-out data, at the fewest shots, transductive: as the curve's points.
    headline = metrics.score(metrics.held_out, metrics.fewest_shots, "trained", "transductive")
    own = {"evaluate_settings_sha256": _hash(chosen), metrics.metric: headline.mean}
    lineage = _inherit(checkpoint) | finite(own)
    evaluation.metadata |= lineage | finite(metrics.flat())
    if (folder / "confusion.csv").is_file():  # a regressor has none
        categories, matrix = confusion_matrix(folder / "confusion.csv")
        confusion.log_confusion_matrix(categories, matrix)
    confusion.metadata |= lineage
    shutil.copyfile(folder / "report.html", report.path)
    report.metadata |= lineage


def measure(settings: str, point: str, prepared: Artifact, checkpoint: Artifact) -> str:
    """Measure held-out accuracy at one point; return it as a row of the table below.

    What cannot be measured is a row too, which says why, as the other points can.

    Args:
        settings: of `evaluate`; its shots do not matter here.
        point: such as `3-way 1-shot frozen`.
        prepared: the dataset.
        checkpoint: trained on it, for as many ways or more.

    Raises:
        InputError: `point` is not written as above.
    """
    found = re.fullmatch(rf"([1-9]\d*)-way ([1-9]\d*)-shot ({'|'.join(BATCH_NORM_MODES)})", point)
    if not found:
        modes = ", ".join(BATCH_NORM_MODES)
        raise InputError(f"point {point!r}: write it as `5-way 1-shot frozen`; modes are {modes}")
    ways, shots = int(found[1]), int(found[2])
    mode = next(mode for mode in BATCH_NORM_MODES if mode == found[3])
    chosen = parse_settings(EvaluateSettings, settings).model_copy(update={"shots": (shots,)})
    try:
        trained_on = load_prepared(Path(prepared.path))
        trained = load_checkpoint(Path(checkpoint.path))
        trained.info.check_data(trained_on)
        scores = metrics(evaluate_checkpoint(chosen, trained, trained_on, {}, ways=ways))
    except InputError as error:
        return f"| {point} | {error} | |"
    objective = objective_named(scores.objective)
    cells = [
        objective.show(*scores.score(scores.held_out, shots, method, mode))
        for method in ("trained", "random")
    ]
    return f"| {point} | {cells[0]} | {cells[1]} |"


def gate(settings: str, champion: str, checkpoint: Artifact, evaluation: Artifact) -> Verdict:
    """Say whether the checkpoint may be exported.

    Args:
        settings: of `export`, whose gate counts.
        champion: the text of an earlier bundle's manifest.json, or "".
        checkpoint: the challenger.
        evaluation: its evaluation.
    """
    chosen = parse_settings(ExportSettings, settings)
    reason = judge(chosen.gate, Path(checkpoint.path), Path(evaluation.path), champion)
    return Verdict(not reason, reason or "")


def export(
    settings: str, prepared: Artifact, checkpoint: Artifact, evaluation: Artifact, bundle: Artifact
) -> None:
    """Write the ONNX bundle."""
    chosen = parse_settings(ExportSettings, settings)
    folder = Path(bundle.path)
    stages.export(chosen, Path(prepared.path), Path(checkpoint.path), Path(evaluation.path), folder)
    point = chosen.gate
    metrics = read_metrics(Path(evaluation.path))
    gated = metrics.score(metrics.held_out, point.shots, "trained", point.mode)
    own = {
        "export_settings_sha256": _hash(chosen),
        "name": chosen.name,
        "manifest_sha256": sha256_file(folder / "manifest.json"),
        metrics.metric: gated.mean,
        "interval": gated.interval,
    }
    bundle.metadata |= _inherit(evaluation) | finite(own)


def verify(
    settings: str,
    prepared: Artifact,
    checkpoint: Artifact,
    bundle: Artifact,
    verification: Artifact,
) -> str:
    """Check the bundle against eager PyTorch; return the SHA-256 of the manifest that held."""
    chosen = parse_settings(VerifySettings, settings)
    report = stages.verify(
        chosen,
        Path(prepared.path),
        Path(checkpoint.path),
        Path(bundle.path),
        Path(verification.path),
    )
    own = {"verify_settings_sha256": _hash(chosen), "checks_passed": len(report["checks"])}
    verification.metadata |= _inherit(bundle) | finite(own)
    return sha256_file(Path(bundle.path) / "manifest.json")


def publish(bundle: Artifact, remote: str, pointer: Artifact) -> None:
    """Push the bundle to a DVC remote; its .dvc file is the pointer."""
    publish_bundle(Path(bundle.path), remote, Path(pointer.path))
    pointer.metadata |= _inherit(bundle) | {
        "remote": remote,
        "manifest_sha256": bundle.metadata["manifest_sha256"],
    }


def confusion_matrix(path: Path) -> tuple[list[str], list[list[int]]]:
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


# What passes from an artifact to those made of it; its own scores and hashes do not.
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
    "accuracy",
)


def _inherit(artifact: Artifact) -> dict[str, Any]:
    return {
        name: value
        for name, value in artifact.metadata.items()
        if name in _LINEAGE or name.endswith("_settings_sha256")
    }


def _hash(settings: Section) -> str:
    return settings_sha256(settings.model_dump(mode="json"))
