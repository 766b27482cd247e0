"""Bundles of a small table: machines whose wear grows with the dose, each at its own rate."""

import csv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reptile.data.coding import Coding
from reptile.data.dataset import PreparedData
from reptile.data.prepare import prepare
from reptile.export.write import export_bundle
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.run import run_training
from reptile.settings import EvaluateSettings, ExportSettings, PrepareSettings, TrainSettings

LEARNERS: dict[str, dict[str, Any]] = {
    "bayes": {"algorithm": "bayes", "meta_batch": 4, "ways": 1},
    "reptile": {"inner_steps": 3, "inner_batch": 4, "ways": 1},
    "protonet": {"algorithm": "protonet", "ways": 2, "episode": {"shots": [2], "queries": 2}},
}
INPUTS = ["when", "dose", "site"]
EVALUATION = EvaluateSettings(tasks=2, steps=5, batch=4, shots=(1,))


class Made(NamedTuple):
    """A bundle, and what it was made of."""

    folder: Path
    checkpoint: Checkpoint
    data: PreparedData
    coding: Coding


def make_bundle(name: str, folder: Path) -> Made:
    """Write the table and the bundle of a learner, hardly trained."""
    columns: dict[str, Any] = {
        "task": "machine",
        "inputs": INPUTS,
        "targets": ["wear"],
        "missing": "fill",
    }
    if name == "protonet":
        columns |= {"kind": "classes", "targets": ["grade"]}
    settings = PrepareSettings.model_validate(
        {
            "source": str(_write_table(folder / "machines.csv")),
            "cross_domain": (),
            "images_per_class": 6,
            "validation": 3,
            "test": 6,
            "table": columns,
        }
    )
    data = prepare(settings, folder / "prepared")
    training = TrainSettings.model_validate(
        {
            "model": {"name": "mlp", "hidden": [16], "activation": "tanh"},
            "meta_iterations": 20,
            "checkpoint_every": 20,
            "validation_tasks": 2,
            "train_shots": 5,
            "engine": "eager",
            "device": "cpu",
            **LEARNERS[name],
        }
    )
    checkpoint = run_training(training, data)
    export = ExportSettings.model_validate({"max_steps": 60, "max_support": 100})
    export_bundle(export, checkpoint, data, None, folder / "bundle", protocol=EVALUATION)
    assert data.index.coding is not None
    return Made(folder / "bundle", checkpoint, data, data.index.coding)


def _write_table(path: Path) -> Path:
    """Write 24 rows of each of 24 machines; the means of dates and wear are large."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["machine", "grade", *INPUTS, "wear"])
        for machine in range(24):
            rate = rng.normal(3, 1)
            for row in range(24):
                dose = rng.normal(2000, 300)
                day = datetime(2026, 1, 1 + row, 12, row, tzinfo=UTC)
                wear = 50_000 + 40 * rate * (dose / 100 - 20) + rng.normal(0, 5)
                writer.writerow(
                    [
                        f"m{machine}",
                        "high" if dose > 2000 else "low",
                        day.strftime("%Y-%m-%d %H:%M:%S"),
                        "" if row % 11 == 5 else f"{dose:.1f}",
                        ["north", "south", "west"][row % 3],
                        f"{wear:.2f}",
                    ]
                )
    return path
