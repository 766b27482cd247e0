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
CLIENTS, TASKS = 3, 6  # clients that create tasks, and the most tasks of each


class Request(NamedTuple):
    """What creates a task; determined by its seed."""

    seed: int
    images: Any

    @property
    def body(self) -> dict[str, Any]:
        return {"images": self.images.tolist(), "labels": LABELS, "steps": 3, "seed": self.seed}


def request(model: FewShotModel, seed: int) -> Request:
    rng = np.random.default_rng(seed)
    return Request(seed, rng.integers(0, 256, (len(LABELS), *model.image_shape)))


def check_tasks(server: Server, model: FewShotModel, requests: Mapping[str, Request]) -> None:
    """Each task is there, and predicts what the same request gives in this process."""
    listed = {task["id"] for task in server.request("GET", "/tasks").json()["tasks"]}
    assert requests.keys() <= listed
    queries = np.random.default_rng(0).integers(0, 256, (3, *model.image_shape))
    for name, sent in requests.items():
        answer = server.request("POST", f"/tasks/{name}/predict", {"images": queries.tolist()})
        assert answer.status == 200, answer
        found = [
            [one["probabilities"][label] for label in ("a", "b")]
            for one in answer.json()["predictions"]
        ]
        here = model.adapt(sent.images, LABELS, steps=3, seed=sent.seed)
        np.testing.assert_allclose(found, here.predict(queries).probabilities, atol=1e-5)


def kill_again_and_again(bundle: Path, folder: Path, kills: int) -> None:
    model, rng = FewShotModel.load(bundle), random.Random(0)
    acknowledged: dict[str, Request] = {}
    attempts = 0
    for kill in range(kills):
        with Server(bundle, "--tasks", str(folder)) as server:
            latest = dict(list(acknowledged.items())[-CLIENTS * TASKS :])
            check_tasks(server, model, latest)

            def create(first: int, server: Server = server) -> None:
                for seed in range(first, first + TASKS):
                    sent = request(model, seed)
                    try:
                        answer = server.request("POST", "/tasks", sent.body)
                    except (OSError, http.client.HTTPException):
                        return  # killed
                    if answer.status == 201:
                        acknowledged[answer.json()["id"]] = sent

            firsts = [1000 * kill + 100 * n for n in range(CLIENTS)]
            threads = [threading.Thread(target=create, args=(first,)) for first in firsts]
            for thread in threads:
                thread.start()
            threads[0].join(rng.uniform(0.005, 0.25))
            server.kill()
            for thread in threads:
                thread.join()
            attempts += CLIENTS * TASKS
    assert kills < len(acknowledged) < attempts  # tasks were created, and some interrupted
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
        answer = server.request("POST", "/tasks", request(model, 1).body)
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
            check_tasks(server, model, {good: request(model, 1)})
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
