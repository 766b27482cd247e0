"""What the machine around a server lacks or adds: files, an address, a proxy, a right clock."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.server import Answer, Server, multipart
from reptile.errors import InputError
from reptile.serve.run import bind

MIB = 1 << 20
# The process can write to no file at all, so no folder for temporary files is usable; `cat`, which
# takes its log, still can.
WRITES_NO_FILE = ("bash", "-c", 'exec > >(cat) 2>&1; ulimit -f 0; exec "$@"', "bash")


def noise(side: int, seed: int) -> bytes:
    """Return a PNG file that does not compress."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def post_form(server: Server, path: str, *files: tuple[str, bytes]) -> Answer:
    body, content_type = multipart([(field, "a.png", content) for field, content in files])
    return server.request("POST", path, body, {"content-type": content_type})


def shape_of(bundle: Path) -> tuple[int, ...]:
    return tuple(json.loads((bundle / "manifest.json").read_bytes())["task"]["image_shape"])


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bodies_of_every_form_and_size_are_taken_where_no_file_can_be_written(
    exported: Path,
) -> None:
    with Server(exported, "-S", "max_images=5000", prefix=WRITES_NO_FILE) as server:
        for side in (30, 1300, 2300):  # up to 5 MiB: beyond what libraries keep in memory
            files = [(label, noise(side, n)) for n, label in enumerate("aabb")]
            if sum(len(content) for _, content in files) > 12 * MIB:
                files = files[1:3]
            answer = post_form(server, "/tasks?steps=1", *files)
            assert answer.status == 201, (side, answer)
            predict = f"/tasks/{answer.json()['id']}/predict"
            assert post_form(server, predict, ("image", noise(side, 9))).status == 200

        images = np.random.default_rng(0).integers(
            0, 256, (3000, *shape_of(exported)), dtype=np.uint8
        )
        body = json.dumps({"images": images.tolist()}).encode()
        assert len(body) > MIB
        as_json = {"content-type": "application/json"}
        assert server.request("POST", predict, body, as_json).status == 200
        tensor: dict[str, Any] = {"name": "images", "datatype": "FP32", "shape": images.shape}
        pixels = images.astype("<f4").tobytes()
        head = json.dumps(
            {"inputs": [tensor | {"parameters": {"binary_data_size": len(pixels)}}]}
        ).encode()
        assert len(pixels) > MIB
        infer = predict.replace("/tasks/", "/v2/models/task-").replace("/predict", "/infer")
        length = {"inference-header-content-length": str(len(head))}
        assert server.request("POST", infer, head + pixels, length).status == 200
        assert "Traceback" not in server.log


def test_a_task_that_cannot_be_written_is_507_and_the_server_goes_on(
    exported: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("limits of another process can be set on Linux only")
    images = np.random.default_rng(0).integers(0, 256, (2, *shape_of(exported))).tolist()
    body = {"images": images, "labels": ["a", "b"], "steps": 1}
    with Server(exported, "--tasks", str(tmp_path / "tasks")) as server:
        kept = server.request("POST", "/tasks", body).json()
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1000, limits[1]))
        refused = server.request("POST", "/tasks", body)
        assert refused.status == 507
        assert str(tmp_path) not in refused.json()["error"]
        assert server.request("GET", "/tasks").json() == {"tasks": [kept]}
        assert len(list((tmp_path / "tasks").glob("*.safetensors"))) == 1
        ready = server.request("GET", "/v2/health/ready")
        assert ready.status == 503 and "tasks cannot be stored" in ready.json()["error"]
        assert str(tmp_path) not in ready.json()["error"]
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
        assert server.request("GET", "/v2/health/ready").status == 200
        assert server.request("POST", "/tasks", body).status == 201
        assert {each.name for each in (tmp_path / "tasks").glob(".*")} == {".lock"}


def test_a_folder_of_tasks_that_was_removed_is_not_made_again_without_its_lock(
    exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    body = {"images": np.full((2, *shape_of(exported)), 9).tolist(), "labels": ["a", "b"]}
    with Server(exported, "--tasks", str(folder)) as server:
        kept = server.request("POST", "/tasks", body).json()["id"]
        shutil.rmtree(folder)
        assert server.request("POST", "/tasks", body).status == 507
        assert server.request("GET", "/v2/health/ready").status == 503
        assert not folder.exists()
        asked = {"images": body["images"]}
        assert server.request("POST", f"/tasks/{kept}/predict", asked).status == 200
        folder.mkdir()
        (folder / ".lock").touch()  # another server's
        assert server.request("POST", "/tasks", body).status == 507
        assert list(folder.glob("*.safetensors")) == []


def test_a_task_whose_file_stays_is_not_said_to_be_deleted(exported: Path, tmp_path: Path) -> None:
    body = {"images": np.full((2, *shape_of(exported)), 9).tolist(), "labels": ["a", "b"]}
    with Server(exported, "--tasks", str(tmp_path)) as server:
        task = server.request("POST", "/tasks", body).json()["id"]
        file = tmp_path / f"{task}.safetensors"
        file.unlink()
        file.mkdir()  # which `unlink` refuses, as it does files of a read-only folder
        assert server.request("DELETE", f"/tasks/{task}").status == 507
        assert server.request("GET", f"/tasks/{task}").status == 200
        file.rmdir()
        assert server.request("DELETE", f"/tasks/{task}").status == 204


def test_a_task_from_a_wrong_clock_is_listed_and_expires(exported: Path, tmp_path: Path) -> None:
    body = {"images": np.full((2, *shape_of(exported)), 9).tolist(), "labels": ["a", "b"]}
    with Server(exported, "--tasks", str(tmp_path)) as server:
        task = server.request("POST", "/tasks", body).json()["id"]
    os.utime(tmp_path / f"{task}.safetensors", (0, 2**36))  # the year 4147, or as far as it goes
    with Server(exported, "--tasks", str(tmp_path)) as server:
        (listed,) = server.request("GET", "/tasks").json()["tasks"]
        assert datetime.fromisoformat(listed["taught"]) <= datetime.now(UTC)
        assert "REPTILE_TOKEN" not in server.log  # nobody else reaches it


def test_a_bundle_that_was_removed_is_503_without_a_path(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "bundle")
    with Server(copy) as server:
        shutil.rmtree(copy)
        answer = server.request("GET", "/bundle/manifest.json")
        assert answer.status == 503 and str(tmp_path) not in answer.json()["error"]
        assert "manifest.json" in server.log
        body = {"images": np.full((2, *shape_of(exported)), 9).tolist(), "labels": ["a", "b"]}
        assert server.request("POST", "/tasks", body).status == 201


@pytest.mark.parametrize("host", ["127.0.0.1", "", "no such host", "192.0.2.1", "x" * 70])
def test_an_address_that_cannot_be_listened_on_is_said_in_a_sentence(host: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(InputError, match="--host"):
            bind(host, listener.getsockname()[1])


def test_a_host_is_listened_on_at_those_of_its_addresses_that_the_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`localhost` may have one of IPv6 where there is no IPv6, and some names have one twice."""
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    elsewhere = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [elsewhere, here, here])
    (bound,) = bind("localhost", 0)
    with bound:
        assert bound.getsockname()[0] == "127.0.0.1"


def test_a_port_in_use_ends_the_command_with_a_sentence(exported: Path) -> None:
    with Server(exported) as first, pytest.raises(InputError) as caught:
        Server(exported, "--port", str(first.port))  # the last one counts
    assert "the server ended with 2: error: 127.0.0.1, port" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_server_that_others_reach_without_a_token_says_so(exported: Path) -> None:
    with Server(exported, "--host", "0.0.0.0") as server:
        assert "REPTILE_TOKEN is not set" in server.log


@pytest.fixture
def health_check(root: Path) -> list[str]:
    """The container's HEALTHCHECK, with this Python."""
    text = (root / "Containerfile").read_text(encoding="utf-8")
    (command,) = re.findall(r"^HEALTHCHECK.*?CMD (\[.*?\])$", text, re.DOTALL | re.MULTILINE)
    program, *arguments = json.loads(command)
    assert program == "python3"
    return [sys.executable, *arguments]


@pytest.fixture
def dead_end() -> Iterator[str]:
    """The address of a proxy that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def check(command: list[str], port: int, environment: dict[str, str]) -> int:
    names = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    clean = {name: value for name, value in os.environ.items() if name.lower() not in names}
    mine = [argument.replace(":8080/", f":{port}/") for argument in command]
    assert mine != command
    return subprocess.run(
        mine, env=clean | environment, stderr=subprocess.DEVNULL, timeout=30, check=False
    ).returncode


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("http_proxy",),
        ("HTTP_PROXY",),
        ("all_proxy", "ALL_PROXY"),
        ("https_proxy", "HTTPS_PROXY"),
        ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"),
    ],
    ids=" ".join,
)
def test_a_health_check_asks_the_server_itself_whatever_proxy_is_set(
    exported: Path, health_check: list[str], dead_end: str, names: tuple[str, ...]
) -> None:
    environment = dict.fromkeys(names, dead_end)
    with Server(exported) as server:
        assert check(health_check, server.port, environment) == 0
    assert check(health_check, server.port, environment) != 0  # it has ended
