"""Unfinished runs: what resuming says, and how leftovers are listed."""

import logging
import shutil
from pathlib import Path

import pytest
from patterns import make_data

from reptile.data.dataset import PreparedData
from reptile.learn.checkpoint import CheckpointInfo
from reptile.learn.run import run_training
from reptile.learn.run_folder import (
    describe_start,
    differences,
    run_folder,
    unfinished_runs,
)
from reptile.learn.train import Progress, untrained
from reptile.settings import TrainSettings


def settings_of(**changes: object) -> TrainSettings:
    values: dict[str, object] = {
        "engine": "eager",
        "model": {"filters": 4},
        "ways": 3,
        "train_shots": 4,
        "inner_steps": 1,
        "inner_batch": 4,
        "meta_batch": 1,
        "meta_iterations": 6,
        "checkpoint_every": 2,
        "validation_tasks": 1,
        "device": "cpu",
    }
    return TrainSettings.model_validate(values | changes)


@pytest.fixture(scope="module")
def cut(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was interrupted after its checkpoint at meta-iteration 4."""
    work = tmp_path_factory.mktemp("work")

    def interrupt(progress: Progress) -> None:
        if progress.iteration == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(settings_of(), data, work, on_progress=interrupt)
    return work


def other(info: CheckpointInfo, **changes: object) -> CheckpointInfo:
    return info.model_copy(update=changes)


def test_a_run_is_listed_with_its_iteration_and_size(cut: Path, data: PreparedData) -> None:
    [run] = unfinished_runs(cut)
    now = untrained(settings_of(), data).info
    assert run.folder == run_folder(cut, now)
    assert run.iteration == 4
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert run.size == sum(len(path.read_bytes()) for path in files) > 1000
    assert differences(run.info, now) == ""


def test_what_keeps_a_run_from_being_resumed_is_named(data: PreparedData) -> None:
    now = untrained(settings_of(), data).info
    assert differences(other(now, iteration=3), now) == ""
    assert differences(other(now, code_sha256="0" * 64), now) == "other code"
    assert differences(other(now, data_sha256="f" * 64), now) == "other data"
    assert differences(other(now, splits_sha256="f" * 64), now) == "other data"
    assert differences(other(now, module="Mine"), now) == "other network"
    before = other(now, versions=now.versions | {"torch": "1.0"})
    assert differences(before, now) == (f"other packages (torch: 1.0, now {now.versions['torch']})")
    before = other(now, settings=settings_of(seed=3, model={"filters": 8}), code_sha256="0" * 64)
    assert differences(before, now) == (
        "other settings (model.filters: 8, now 4, seed: 3, now 0), other code"
    )
    assert "another version" in differences(None, now)


def test_resuming_says_from_where(
    cut: Path, data: PreparedData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(cut, tmp_path / "work")
    first: list[int] = []
    with caplog.at_level(logging.INFO, "reptile"):
        run_training(
            settings_of(),
            data,
            tmp_path / "work",
            resume=True,
            on_progress=lambda progress: first.append(progress.iteration),
        )
    [run] = unfinished_runs(cut)
    assert f"resuming {tmp_path / 'work' / run.folder.name} after meta-iteration 4" in caplog.text
    assert first[0] == 5


def test_starting_anew_says_why_and_what_is_left_over(cut: Path, data: PreparedData) -> None:
    message = describe_start(cut, untrained(settings_of(seed=1), data).info)
    [run] = unfinished_runs(cut)
    assert f"starting anew, not resuming {run.folder} (meta-iteration 4)" in message
    assert "seed: 0, now 1" in message
    assert "`reptile runs`" in message
    turned = make_data(classes={"train": 12, "test": 8})
    assert "other data" in describe_start(cut, untrained(settings_of(), turned).info)


def test_without_unfinished_runs_there_is_nothing_to_say(
    data: PreparedData, tmp_path: Path
) -> None:
    assert unfinished_runs(tmp_path / "none") == []
    assert describe_start(tmp_path, untrained(settings_of(), data).info) == ""


def test_what_is_no_run_is_left_alone_and_an_unreadable_one_is_listed(
    cut: Path, data: PreparedData, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / ("0" * 16)).mkdir()  # no checkpoint in it yet
    damaged = tmp_path / ("a" * 16) / "iteration-00000007"
    damaged.mkdir(parents=True)
    (damaged / "checkpoint.json").write_text('{"format": 0}')
    [run] = unfinished_runs(tmp_path)
    assert (run.iteration, run.info) == (7, None)
    message = describe_start(tmp_path, untrained(settings_of(), data).info)
    assert "another version of reptile" in message
