"""`reptile train` stopped by a signal: it leaves a checkpoint, and its exit code says so."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from reptile.data.dataset import PreparedData
from reptile.files import write_json
from reptile.learn.checkpoint import load_checkpoint

SETTINGS = {
    "engine": "eager",
    "model": {"filters": 4},
    "ways": 3,
    "train_shots": 4,
    "inner_steps": 3,
    "inner_batch": 4,
    "meta_batch": 2,
    "meta_iterations": 300,
    "checkpoint_every": 100,
    "validation_tasks": 1,
    "device": "cpu",
}


def train(folder: Path, *options: str) -> "subprocess.Popen[str]":
    def take_signals() -> None:  # a shell starts background jobs without Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(
        [sys.executable, "-m", "reptile", "train", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=take_signals,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_ends_training_with_a_checkpoint_that_resumes_to_the_same_bytes(
    number: signal.Signals, code: int, data: PreparedData, tmp_path: Path
) -> None:
    prepared = tmp_path / "artifacts/prepared"
    prepared.mkdir(parents=True)
    np.save(prepared / "images.npy", data.images)
    write_json(prepared / "dataset.json", data.index.model_dump(mode="json"))
    later = {"evaluate": {"shots": [1]}, "verify": {"shots": 1}}
    (tmp_path / "params.yaml").write_text(json.dumps({"train": SETTINGS} | later))
    work = tmp_path / "artifacts/training"

    run = train(tmp_path)
    deadline = time.monotonic() + 60
    while not list(work.glob("*/iteration-*")) and time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    time.sleep(0.1)  # some meta-iterations, so that it stops between two points of the curve
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code, errors
    (kept,) = work.glob("*/iteration-*")
    iteration = load_checkpoint(kept).info.iteration
    assert 100 < iteration < 300
    assert f"stopped after meta-iteration {iteration} of 300; resume" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "artifacts/checkpoint").exists()

    _, errors = train(tmp_path, "--resume").communicate(timeout=120)
    assert f"resuming {kept.parent.relative_to(tmp_path)}" in errors
    resumed = tmp_path / "artifacts/checkpoint"
    resumed.rename(tmp_path / "resumed")
    whole = train(tmp_path)
    whole.communicate(timeout=120)
    assert whole.returncode == 0
    for file in ("weights.safetensors", "checkpoint.json"):
        assert (resumed / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()
    assert not list(work.iterdir())
