"""Training that survives: killed or stopped, it resumes from a folder or a store, same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from object_store import BUCKET, ObjectStore, object_store
from patterns import make_data
from training_task import FILES, SCRIPT, SETTINGS, write_prepared

from components.store import Store
from reptile.errors import InputError, PlatformError
from reptile.learn.checkpoint import load_checkpoint, save_checkpoint
from reptile.learn.run import run_training
from reptile.learn.run_folder import is_whole, keep
from reptile.learn.train import untrained


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_prepared(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training that never stopped, in this process."""
    folder = tmp_path_factory.mktemp("whole")
    save_checkpoint(folder / "checkpoint", run_training(SETTINGS, make_data()))
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


class Task:
    """The task `train` as a pod runs it, with a work folder or store that outlives the pod."""

    def __init__(self, folder: Path, prepared: Path, store: ObjectStore | None) -> None:
        self._folder, self._prepared, self._store = folder, prepared, store
        self._pods = 0
        self.secret = store.mount(folder / "secret") if store else folder / "no-secret"
        self.work = f"s3://{BUCKET}/{folder.name}" if store else str(folder / "work")

    def start(self) -> "subprocess.Popen[str]":
        """Start a pod: the outputs of the one before are not there."""
        self._pods += 1
        self.pod = self._folder / f"pod-{self._pods}"
        self.pod.mkdir()
        (self.pod / "prepared").symlink_to(self._prepared)
        arguments = (str(self.pod), SETTINGS.model_dump_json(), self.work, str(self.secret))
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments],
            cwd=Path(__file__).parents[2],
            # As the launcher of Kubeflow may have them: keys of another store.
            env=os.environ | {"AWS_ACCESS_KEY_ID": "launcher", "AWS_SECRET_ACCESS_KEY": "launcher"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def kept(self) -> list[str]:
        """The names of the checkpoints that would be resumed from."""
        if self._store:
            names = self._store.names(f"{self._folder.name}/")
            return [name.split("/")[-2] for name in names if name.endswith("sha256.json")]
        return [path.name for path in Path(self.work).glob("*/iteration-*") if is_whole(path)]

    def until_kept(self, process: "subprocess.Popen[str]") -> None:
        """Wait for the first checkpoint, and then a moment."""
        deadline = time.monotonic() + 120
        while not self.kept():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def gives(self, whole: Path) -> None:
        """Hold the outputs to those of a training that never stopped, and the work to nothing."""
        for file in FILES:
            assert (self.pod / "checkpoint" / file).read_bytes() == (whole / file).read_bytes()
        assert {path.name for path in (self.pod / "checkpoint").iterdir()} == set(FILES)
        points = (self.pod / "curves/plots/metrics/loss.tsv").read_text().splitlines()[1:]
        assert [point.split("\t")[0] for point in points] == [
            "100",
            "200",
            "300",
            "400",
            "500",
            "600",
        ]
        left = {path.name for path in self.pod.iterdir()}
        assert left == {"prepared", "checkpoint", "curves", ".lock"}
        assert self.kept() == []


@pytest.fixture(params=["folder", "store"])
def task(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    prepared: Path,
    get_store: Callable[[], ObjectStore],
) -> Task:
    return Task(tmp_path, prepared, get_store() if request.param == "store" else None)


@pytest.fixture
def get_store(request: pytest.FixtureRequest) -> Callable[[], ObjectStore]:
    return lambda: request.getfixturevalue("store")


def child_of(process: "subprocess.Popen[str]") -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1])


def test_a_killed_training_process_goes_on_in_the_same_task(task: Task, whole: Path) -> None:
    """And what a lost attempt left among the outputs is gone."""
    process = task.start()
    left = (
        ".checkpoint.0123456789abcdef0123456789abcdef.tmp/weights.safetensors",
        "checkpoint/half.safetensors",
        "curves/plots/metrics/old.tsv",
    )
    for path in left:  # of an attempt before
        (task.pod / path).parent.mkdir(parents=True, exist_ok=True)
        (task.pod / path).write_text("left")
    task.until_kept(process)
    os.kill(child_of(process), signal.SIGKILL)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "killed by SIGKILL" in printed
    assert "(restart 1 of 3)" in printed
    assert "resuming" in printed
    metadata = json.loads(printed.splitlines()[-1])
    assert metadata["validation_accuracy"] == load_checkpoint(whole).info.curve[-1].score
    task.gives(whole)
    assert not any((task.pod / path).exists() for path in left)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_pod_that_is_stopped_or_lost_is_followed_by_one_that_goes_on(
    number: signal.Signals, task: Task, whole: Path
) -> None:
    process = task.start()
    task.until_kept(process)
    if number == signal.SIGTERM:
        process.terminate()
    else:
        os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == (143 if number == signal.SIGTERM else -number), printed
    assert not (task.pod / "checkpoint").exists(), "ended too late to show anything"
    if number == signal.SIGTERM:
        (kept,) = task.kept()
        assert f"stopped after meta-iteration {int(kept[-8:])} of 600" in printed
        assert "starting again" not in printed

    process = task.start()
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "resuming" in printed
    task.gives(whole)


def test_a_damaged_checkpoint_in_the_store_is_not_used(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = untrained(SETTINGS, make_data())
    keep(tmp_path / "run", checkpoint)
    secret = store.mount(tmp_path / "secret")
    there = Store(f"s3://{BUCKET}/damaged/run", secret)
    there.put(tmp_path / "run/iteration-00000000")
    there.fetch(tmp_path / "good")
    assert is_whole(tmp_path / "good/iteration-00000000")

    name = "damaged/run/iteration-00000000/weights.safetensors"
    content = bytearray(store.client().get_object(Bucket=BUCKET, Key=name)["Body"].read())
    content[-1] ^= 1
    store.client().put_object(Bucket=BUCKET, Key=name, Body=bytes(content))
    Store(f"s3://{BUCKET}/damaged/run", secret).fetch(tmp_path / "bad")
    assert not list((tmp_path / "bad").glob("*"))
    assert "damaged" in caplog.text


def test_a_store_that_cannot_be_used_is_one_sentence(store: ObjectStore, tmp_path: Path) -> None:
    secret = store.mount(tmp_path / "secret")
    (secret / "AWS_SECRET_ACCESS_KEY").unlink()
    (secret / "AWS_SECRET_ACCESS_KEY").write_text("wrong")
    with pytest.raises(PlatformError, match="cannot be read") as refused:
        Store(f"s3://{BUCKET}/x/run", secret).fetch(tmp_path / "run")
    assert "wrong" not in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="s3:// unless"):
        Store("nowhere://bucket/run", tmp_path / "no-secret")
