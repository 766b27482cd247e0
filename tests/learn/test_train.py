"""Training as a whole: resuming, diverging, learning."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from patterns import make_data

from reptile.data.dataset import PreparedData
from reptile.errors import DivergedError, InputError, PlatformError, StoppedError
from reptile.files import write_json
from reptile.learn.checkpoint import load_checkpoint, save_checkpoint
from reptile.learn.engines import choose_device
from reptile.learn.run import run_training
from reptile.learn.run_folder import is_whole
from reptile.learn.train import Progress
from reptile.settings import TrainSettings


def settings_of(**changes: object) -> TrainSettings:
    values: dict[str, object] = {
        "engine": "eager",
        "model": {"filters": 4},
        "ways": 3,
        "train_shots": 4,
        "inner_steps": 3,
        "inner_batch": 4,
        "meta_batch": 2,
        "meta_iterations": 12,
        "checkpoint_every": 4,
        "validation_tasks": 1,
        "device": "cpu",
    }
    return TrainSettings.model_validate(values | changes)


def test_resume_equals_never_having_stopped(data: PreparedData, tmp_path: Path) -> None:
    settings = settings_of()
    whole = run_training(settings, data, tmp_path / "whole")

    def kill(progress: Progress) -> None:
        if progress.iteration == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(settings, data, tmp_path / "cut", on_progress=kill)
    seen: list[int] = []
    resumed = run_training(
        settings,
        data,
        tmp_path / "cut",
        resume=True,
        on_progress=lambda progress: seen.append(progress.iteration),
    )
    assert seen[0] == 5  # from the checkpoint after 4, not from the start
    assert torch.equal(resumed.state.weights, whole.state.weights)
    assert torch.equal(resumed.meta.inner.second_moment, whole.meta.inner.second_moment)
    assert resumed.meta.inner.step == whole.meta.inner.step == 12 * 2 * 3
    assert resumed.info == whole.info


def test_resume_ignores_a_run_of_other_settings(data: PreparedData, tmp_path: Path) -> None:
    run_training(settings_of(), data, tmp_path)
    seen: list[int] = []
    run_training(
        settings_of(seed=1),
        data,
        tmp_path,
        resume=True,
        on_progress=lambda progress: seen.append(progress.iteration),
    )
    assert seen[0] == 1


def test_the_same_seed_gives_the_same_bytes(data: PreparedData, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, run_training(settings_of(), data, tmp_path / "work"))
    for file in ("weights.safetensors", "checkpoint.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(
    data: PreparedData, tmp_path: Path
) -> None:
    settings = settings_of(
        optimizer={"name": "sgd", "learning_rate": 100.0},
        meta_step=100.0,
        meta_step_final=100.0,
        checkpoint_every=1,
        meta_iterations=100,
    )
    with pytest.raises(DivergedError, match="no longer finite") as caught:
        run_training(settings, data, tmp_path)
    kept = Path(str(caught.value).split("checkpoint is ")[1].split(". Lower")[0])
    assert load_checkpoint(kept).state.weights.isfinite().all()


def test_kill_9_loses_nothing(data: PreparedData, tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    np.save(prepared / "images.npy", data.images)
    write_json(prepared / "dataset.json", data.index.model_dump(mode="json"))
    settings = settings_of(meta_iterations=40, checkpoint_every=2)
    write_json(tmp_path / "settings.json", settings.model_dump(mode="json"))
    script = (
        "import sys; from pathlib import Path; from reptile.settings import TrainSettings;"
        "from reptile.data.dataset import load_prepared;"
        "from reptile.learn.run import run_training;"
        "from reptile.learn.checkpoint import save_checkpoint; root = Path(sys.argv[1]);"
        "settings = TrainSettings.model_validate_json((root / 'settings.json').read_text());"
        "data = load_prepared(root / 'prepared');"
        "result = run_training(settings, data, root / 'work', resume=True);"
        "save_checkpoint(root / sys.argv[2], result)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    killed = subprocess.Popen([*command, "killed"])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "work").glob("*/iteration-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists(), "the run ended before it was killed"
    subprocess.run([*command, "resumed"], check=True)
    (tmp_path / "work").rename(tmp_path / "old-work")
    subprocess.run([*command, "whole"], check=True)
    for file in ("weights.safetensors", "checkpoint.json"):
        whole = (tmp_path / "whole" / file).read_bytes()
        assert (tmp_path / "resumed" / file).read_bytes() == whole


@pytest.mark.parametrize("damage", ["missing", "json", "safetensors", "shape", "setting"])
def test_a_damaged_checkpoint_is_refused(damage: str, data: PreparedData, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, run_training(settings_of(meta_iterations=1), data, tmp_path / "work"))
    info = folder / "checkpoint.json"
    match damage:
        case "missing":
            info.unlink()
        case "json":
            info.write_text("{")
        case "safetensors":
            (folder / "weights.safetensors").write_bytes(b"0" * 100)
        case "shape":
            info.write_text(info.read_text().replace('"filters": 4', '"filters": 5'))
        case "setting":
            info.write_text(info.read_text().replace('"ways": 3', '"ways": 0'))
    with pytest.raises(InputError):
        load_checkpoint(folder)


def test_without_validation_classes_the_curve_is_of_training_classes(tmp_path: Path) -> None:
    """As the reference code does, which holds out a test split only."""
    data = make_data(classes={"train": 12, "test": 8})
    result = run_training(settings_of(), data, tmp_path)
    assert [point.iteration for point in result.info.curve] == [4, 8, 12]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlatformError, match="no CUDA device"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("at", "algorithm"),
    [(3, "reptile"), (4, "reptile"), (7, "reptile"), (12, "reptile"), (7, "ridge")],
)
def test_stopping_after_any_iteration_and_resuming_gives_the_bytes_of_never_having_stopped(
    at: int, algorithm: str, data: PreparedData, tmp_path: Path
) -> None:
    settings = settings_of(algorithm=algorithm)
    whole = run_training(settings, data, tmp_path / "whole")
    done = 0

    def observe(progress: Progress) -> None:
        nonlocal done
        done = progress.iteration

    work = tmp_path / "cut"
    if at < 12:
        with pytest.raises(StoppedError, match=f"after meta-iteration {at} of 12"):
            run_training(settings, data, work, on_progress=observe, stop=lambda: done == at)
        (kept,) = work.glob("*/iteration-*")
        assert load_checkpoint(kept).info.iteration == at
        resumed = run_training(settings, data, work, resume=True)
    else:  # asked after the last iteration, when there is nothing left to stop
        resumed = run_training(settings, data, work, on_progress=observe, stop=lambda: done == at)
    for name, result in (("a", whole), ("b", resumed)):
        save_checkpoint(tmp_path / name, result)
    for file in ("weights.safetensors", "checkpoint.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("damage", ["a byte of the weights", "a digit of the loss", "cut short"])
def test_a_damaged_checkpoint_of_an_unfinished_run_is_dropped_with_a_warning(
    damage: str, data: PreparedData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_training(settings_of(), data, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run_training(settings_of(), data, tmp_path / "cut", stop=lambda: True)
    (kept,) = (tmp_path / "cut").glob("*/iteration-*")
    weights, info = kept / "weights.safetensors", kept / "checkpoint.json"
    if damage == "a byte of the weights":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif damage == "a digit of the loss":
        values = json.loads(info.read_text())
        values["losses"][0] += 0.5
        info.write_text(json.dumps(values))
    else:
        weights.write_bytes(weights.read_bytes()[:100])
    resumed = run_training(settings_of(), data, tmp_path / "cut", resume=True)
    assert f"{kept}: damaged" in caplog.text
    assert torch.equal(resumed.state.weights, whole.state.weights)
    assert resumed.info == whole.info


def test_digests_that_do_not_cover_the_files_are_damage(data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run_training(settings_of(), data, tmp_path, stop=lambda: True)
    (kept,) = tmp_path.glob("*/iteration-*")
    assert is_whole(kept)
    both = json.dumps({"weights.safetensors": "0", "checkpoint.json": "0"})
    for text in ("{}", "[]", "no JSON", '{"weights.safetensors": "0"}', both):
        (kept / "sha256.json").write_text(text)
        assert not is_whole(kept)
