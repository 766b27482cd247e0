"""Where an artifact came from: hashes and versions that go into it.

STAGES is the one table of which code a stage's result depends on. The dependencies in dvc.yaml,
resuming, and the lineage in Kubeflow go by it; tests/test_provenance.py holds it to what each stage
really imports. Everything here is a function of the code and its packages, never of the time or the
machine, so that the same inputs give the same artifact byte for byte.
"""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

Stage = Literal["prepare", "train", "evaluate", "export", "verify"]

_ALL = ("stages.py", "settings.py", "errors.py", "files.py")
_TRAINED = (  # to read a checkpoint and its data, adapt to tasks and predict
    "data/__init__.py",
    "data/coding.py",
    "data/dataset.py",
    "tasks.py",
    "minibatches.py",
    "objectives.py",
    "cpus.py",
    "models",
    "learn/__init__.py",
    "learn/checkpoint.py",
    "learn/engines",
    "learn/episodic.py",
    "learn/heads.py",
    "learn/inner_loop.py",
    "learn/optimizer.py",
    "learn/predict.py",
    "learn/pretrain.py",
    "learn/prototypes.py",
    "learn/reptile.py",
    "learn/step_sizes.py",
    "learn/validate.py",
)

STAGES: dict[Stage, tuple[str, ...]] = {
    "prepare": (
        *_ALL,
        "images.py",
        "cpus.py",
        "minibatches.py",
        "data/__init__.py",
        "data/array_files.py",
        "data/arrays.py",
        "data/coding.py",
        "data/dataset.py",
        "data/folders.py",
        "data/names.py",
        "data/prepare.py",
        "data/splits.py",
        "data/tables.py",
        "data/published_splits",
        "data/readers",
    ),
    "train": (
        *_ALL,
        *_TRAINED,
        "learn/algorithms.py",
        "learn/curves.py",
        "learn/distributed.py",
        "learn/maml.py",
        "learn/run.py",
        "learn/run_folder.py",
        "learn/shares.py",
        "learn/train.py",
    ),
    "evaluate": (
        *_ALL,
        *_TRAINED,
        "learn/algorithms.py",
        "learn/maml.py",
        "learn/shares.py",
        "learn/train.py",
        "learn/unadapted.py",
        "evaluate/__init__.py",
        "evaluate/adapting.py",
        "evaluate/baselines.py",
        "evaluate/choice.py",
        "evaluate/comparison.py",
        "evaluate/confusions.py",
        "evaluate/features.py",
        "evaluate/fits.py",
        "evaluate/folds.py",
        "evaluate/heads.py",
        "evaluate/measure.py",
        "evaluate/methods.py",
        "evaluate/metrics.py",
        "evaluate/report",
        "evaluate/write.py",
    ),
    "export": (
        *_ALL,
        *_TRAINED,
        "learn/algorithms.py",
        "learn/maml.py",
        "learn/shares.py",
        "learn/train.py",
        "learn/unadapted.py",
        "evaluate",
        "bundle_format.py",
        "export/__init__.py",
        "export/card.py",
        "export/closed_form.py",
        "export/closed_form_golden.py",
        "export/closed_form_reference.py",
        "export/coding.py",
        "export/decompositions.py",
        "export/fold.py",
        "export/forms.py",
        "export/golden.py",
        "export/gradient.py",
        "export/graphs.py",
        "export/place.py",
        "export/reference.py",
        "export/rows.py",
        "export/tracing.py",
        "export/write.py",
    ),
    "verify": (
        *_ALL,
        *_TRAINED,
        "learn/unadapted.py",
        "bundle_format.py",
        "export/__init__.py",
        "export/closed_form_reference.py",
        "export/coding.py",
        "export/decompositions.py",
        "export/fold.py",
        "export/forms.py",
        "export/gradient.py",
        "export/graphs.py",
        "export/place.py",
        "export/reference.py",
        "export/rows.py",
        "export/tracing.py",
        "export/verify",
        "runtime",
    ),
}
"""The files and folders of this package that a stage's result depends on."""

SOURCES = {".py", ".cpp", ".h", ".html", ".json"}
"""What is a source: not byte-code, compiled kernels or caches, which lie beside it."""

PACKAGE = Path(__file__).parent


def sources(stage: Stage) -> Iterator[Path]:
    """Yield the source files of a stage's table entry, each once, in a stable order."""
    roots = [PACKAGE / each for each in STAGES[stage]]
    files = {path for root in roots for path in (root.rglob("*") if root.is_dir() else [root])}
    yield from sorted(path for path in files if path.suffix in SOURCES and path.is_file())


def code_sha256(*stages: Stage) -> str:
    """Return the hash of the source files of these stages, whatever commit they are from."""
    digest = hashlib.sha256()
    for path in sorted({path for stage in stages for path in sources(stage)}):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def settings_sha256(settings: Any) -> str:
    """Return the hash of plain (JSON) settings, whatever order they stand in."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of the packages that shaped an artifact."""
    return {package: version(package) for package in packages}
