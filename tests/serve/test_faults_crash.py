"""An acknowledged task outlives a kill, and no file in the folder of tasks blocks a start."""

import http.client
import os
import random
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from benchmarks.server import Server
from reptile.errors import InputError
from reptile.runtime import FewShotModel

LABELS = ["a", "b", "a", "b"]
TEACHERS, TASKS = 3, 6  # clients that teach, and how many tasks each at most


class Lesson(NamedTuple):
    """What a task is taught with: its seed says it all."""

    seed: int
    images: Any

    @property
    def request(self) -> dict[str, Any]:
        return {"images": self.images.tolist(), "labels": LABELS, "steps": 3, "seed": self.seed}


def lesson(model: FewShotModel, seed: int) -> Lesson:
    rng = np.random.default_rng(seed)
    return Lesson(seed, rng.integers(0, 256, (len(LABELS), *model.image_shape)))


def check_tasks(server: Server, model: FewShotModel, lessons: Mapping[str, Lesson]) -> None:
    """Each task is there, and predicts what the same lesson gives in this process."""
    listed = {task["id"] for task in server.request("GET", "/tasks").json()["tasks"]}
    assert lessons.keys() <= listed
    queries = np.random.default_rng(0).integers(0, 256, (3, *model.image_shape))
    for name, taught in lessons.items():
        answer = server.request("POST", f"/tasks/{name}/predict", {"images": queries.tolist()})
        assert answer.status == 200, answer
        found = [
            [one["probabilities"][label] for label in ("a", "b")]
            for one in answer.json()["predictions"]
        ]
        here = model.adapt(taught.images, LABELS, steps=3, seed=taught.seed)
        np.testing.assert_allclose(found, here.predict(queries).probabilities, atol=1e-5)


def kill_again_and_again(bundle: Path, folder: Path, kills: int) -> None:
    model, rng = FewShotModel.load(bundle), random.Random(0)
    acknowledged: dict[str, Lesson] = {}
    attempts = 0
    for kill in range(kills):
        with Server(bundle, "--tasks", str(folder)) as server:
            latest = dict(list(acknowledged.items())[-TEACHERS * TASKS :])
            check_tasks(server, model, latest)

            def teach(first: int, server: Server = server) -> None:
                for seed in range(first, first + TASKS):
                    taught = lesson(model, seed)
                    try:
                        answer = server.request("POST", "/tasks", taught.request)
                    except (OSError, http.client.HTTPException):
                        return  # killed
                    if answer.status == 201:
                        acknowledged[answer.json()["id"]] = taught

            firsts = [1000 * kill + 100 * n for n in range(TEACHERS)]
            threads = [threading.Thread(target=teach, args=(first,)) for first in firsts]
            for thread in threads:
                thread.start()
            threads[0].join(rng.uniform(0.005, 0.25))
            server.kill()
            for thread in threads:
                thread.join()
            attempts += TEACHERS * TASKS
    assert kills < len(acknowledged) < attempts  # it was taught, and was interrupted
    with Server(bundle, "--tasks", str(folder)) as server:
        check_tasks(server, model, acknowledged)
    assert not set(folder.glob(".*")) - {folder / ".lock"}, (
        "a write that was cut short left its file for ever"
    )


def test_what_was_acknowledged_outlives_a_few_kills(exported: Path, tmp_path: Path) -> None:
    kill_again_and_again(exported, tmp_path / "tasks", 3)


@pytest.mark.slow
def test_what_was_acknowledged_outlives_fifty_kills(exported: Path, tmp_path: Path) -> None:
    kill_again_and_again(exported, tmp_path / "tasks", 50)


def another_bundles(content: bytes) -> bytes:
    place = content.index(b'"bundle_sha256"') + len(b'"bundle_sha256": "')
    return content[:place] + b"0" * 64 + content[place + 64 :]


def not_a_number(content: bytes) -> bytes:
    return content[:-4] + b"\0\0\xc0\x7f"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "short": lambda content: content[:5],
    "header cut": lambda content: content[:40],
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "huge header": lambda content: b"\xff" * 8 + content[8:],
    "no text": lambda content: content[:8] + b"\xff" * 20 + content[28:],
    "another bundle's": another_bundles,
    "not a number": not_a_number,
    "a picture": lambda content: b"\x89PNG\r\n\x1a\n" + bytes(100),
}


def test_no_file_in_the_folder_blocks_the_start(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "tasks", FewShotModel.load(exported)
    with Server(exported, "--tasks", str(folder)) as server:
        answer = server.request("POST", "/tasks", lesson(model, 1).request)
        assert answer.status == 201, answer
    good = answer.json()["id"]
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()

    def place() -> Path:
        return folder / f"{uuid.uuid4()}{file.suffix}"

    for damage in DAMAGES.values():
        place().write_bytes(damage(content))
    place().mkdir()
    (folder / "more").mkdir()
    shutil.copy(file, folder / "more")
    shutil.copy(file, folder / "my favourite.safetensors")
    shutil.copy(file, folder / f"{str(uuid.uuid4()).upper()}{file.suffix}")
    (folder / "README.txt").write_text("not a task")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\n.safetensors")).write_bytes(b"")
    secret = place()
    secret.write_bytes(content)
    secret.chmod(0)
    place().symlink_to(folder / "nowhere")
    loop = place()
    loop.symlink_to(loop)
    place().symlink_to("/dev/zero")
    os.mkfifo(place())
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(folder)  # a socket's path may only be short
        listener.bind(place().name)
        before = set(folder.iterdir())
        with Server(exported, "--tasks", str(folder)) as server:
            check_tasks(server, model, {good: lesson(model, 1)})
            listed = {task["id"] for task in server.request("GET", "/tasks").json()["tasks"]}
            # Root may read what nobody may.
            assert listed - {secret.stem} == {good}
            assert server.request("DELETE", f"/tasks/{good}").status == 204
        assert set(folder.iterdir()) == before - {file}  # what is not understood is not touched


def test_a_folder_that_cannot_be_used_is_said_at_once(exported: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=r"the server ended with 2: error: .*file"):
        Server(exported, "--tasks", str(file))
