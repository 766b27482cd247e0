"""Several processes of one training: the same result as one, and a lost one is no disaster."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from patterns import make_data
from torch.multiprocessing.spawn import spawn

from reptile.data.dataset import PreparedData
from reptile.files import write_json
from reptile.learn.checkpoint import load_checkpoint, save_checkpoint
from reptile.learn.distributed import join
from reptile.learn.run import run_training
from reptile.settings import TrainSettings

CPU = torch.device("cpu")
SETTINGS = {
    "model": {"filters": 4},
    "ways": 3,
    "train_shots": 4,
    "inner_steps": 3,
    "inner_batch": 5,
    "meta_batch": 3,  # 2 processes share them as 1 and 2
    "meta_iterations": 6,
    "checkpoint_every": 3,
    "validation_tasks": 3,
    "device": "cpu",
}
CASES: dict[str, dict[str, object]] = {
    **{state: {"optimizer": {"state": state}} for state in ("parallel", "reset", "sequential")},
    "fomaml": {"algorithm": "fomaml", "optimizer": {"state": "reset"}},
    "sgd": {"optimizer": {"name": "sgd", "learning_rate": 0.1, "state": "parallel"}},
    "eager": {"engine": "eager", "optimizer": {"state": "parallel"}},
    "one task": {"meta_batch": 1, "optimizer": {"state": "parallel"}},
}


def settings_of(case: str) -> TrainSettings:
    return TrainSettings.model_validate(SETTINGS | CASES[case])


def train_all(rank: int, size: int, port: int, folder: Path) -> None:
    """What each process runs."""
    place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    with join(CPU) as processes:
        for case in CASES:
            result = run_training(
                settings_of(case), make_data(), folder / "work", processes=processes
            )
            save_checkpoint(folder / case / str(rank), result)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    spawn(train_all, (2, port, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_every_process_ends_with_the_weights_of_one_process(
    case: str, shared: Path, data: PreparedData, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "alone", run_training(settings_of(case), data, tmp_path / "work"))
    for file in ("weights.safetensors", "checkpoint.json"):
        alone = (tmp_path / "alone" / file).read_bytes()
        for rank in ("0", "1"):
            assert (shared / case / rank / file).read_bytes() == alone


def write_prepared(folder: Path, data: PreparedData) -> None:
    prepared = folder / "artifacts/prepared"
    prepared.mkdir(parents=True)
    np.save(prepared / "images.npy", data.images)
    write_json(prepared / "dataset.json", data.index.model_dump(mode="json"))


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "reptile", "train", "--params", "params.yaml", *options]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def test_a_killed_process_ends_the_run_and_resuming_equals_never_having_stopped(
    data: PreparedData, tmp_path: Path
) -> None:
    write_prepared(tmp_path, data)
    changes = {"meta_iterations": 400, "checkpoint_every": 2, "validation_tasks": 1}
    settings = SETTINGS | CASES["parallel"] | changes
    (tmp_path / "params.yaml").write_text(json.dumps({"train": settings}))

    run = start(tmp_path)
    work = tmp_path / "artifacts/training"
    deadline = time.monotonic() + 120
    while not list(work.glob("*/iteration-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "SIGKILL" in errors or "Signal 9" in errors
    assert not (tmp_path / "artifacts/checkpoint").exists(), "it ended before it was killed"
    kept = load_checkpoint(max(work.glob("*/iteration-*")))
    assert 0 < kept.info.iteration < 400

    resumed = start(tmp_path, "--resume")
    assert resumed.wait(timeout=120) == 0
    whole = run_training(TrainSettings.model_validate(settings), data, tmp_path / "work")
    found = load_checkpoint(tmp_path / "artifacts/checkpoint")
    assert torch.equal(found.state.weights, whole.state.weights)
    assert torch.equal(found.meta.inner.second_moment, whole.meta.inner.second_moment)
    assert found.info == whole.info


def test_sigterm_ends_all_processes_after_the_same_iteration_with_a_checkpoint(
    data: PreparedData, tmp_path: Path
) -> None:
    write_prepared(tmp_path, data)
    changes = {"meta_iterations": 200, "checkpoint_every": 50, "validation_tasks": 1}
    settings = SETTINGS | CASES["parallel"] | changes
    (tmp_path / "params.yaml").write_text(json.dumps({"train": settings}))

    run = start(tmp_path)
    work = tmp_path / "artifacts/training"
    deadline = time.monotonic() + 120
    while not list(work.glob("*/iteration-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)  # one alone, as when the node of one is drained
    _, errors = run.communicate(timeout=120)
    stopped = load_checkpoint(max(work.glob("*/iteration-*"))).info
    assert 50 <= stopped.iteration < 200, errors
    assert len(stopped.losses) == stopped.iteration % 50
    assert "another process of this run has gone" not in errors

    resumed = start(tmp_path, "--resume")
    assert resumed.wait(timeout=120) == 0
    whole = run_training(TrainSettings.model_validate(settings), data, tmp_path / "work")
    found = load_checkpoint(tmp_path / "artifacts/checkpoint")
    assert torch.equal(found.state.weights, whole.state.weights)
    assert found.info == whole.info


def test_processes_that_do_not_meet_are_one_clear_error(data: PreparedData, tmp_path: Path) -> None:
    write_prepared(tmp_path, data)
    (tmp_path / "params.yaml").write_text(json.dumps({"train": SETTINGS}))
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    environment.pop("MASTER_ADDR", None)
    command = [sys.executable, "-m", "reptile", "train"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 6
    assert "start them with torchrun" in done.stderr
    assert "Traceback" not in done.stderr
