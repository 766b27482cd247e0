"""Slow clients, many at once, large bodies, and the end under load: others do not notice."""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hostile_images as pictures
import numpy as np
import pytest

from benchmarks.server import HOST, Answer, Server, json_request, multipart
from reptile.runtime import FewShotModel

MIB = 1 << 20
LABELS = ["a", "b", "a", "b"]
BODY_SECONDS = 2
pytestmark = pytest.mark.alone

SLACK = 12  # seconds that a head may take, and a busy machine may add


@pytest.fixture
def images(exported: Path) -> Any:
    shape = FewShotModel.load(exported).image_shape
    return np.random.default_rng(0).integers(0, 256, (4, *shape)).tolist()


@contextmanager
def started(bundle: Path, images: Any, *options: str) -> Iterator[tuple[Server, str]]:
    """A server with a task, and the path of its predictions."""
    with Server(bundle, *options) as server:
        answer = server.request("POST", "/tasks", {"images": images, "labels": LABELS})
        assert answer.status == 201, answer
        yield server, f"/tasks/{answer.json()['id']}/predict"


def test_clients_that_stall_are_let_go_and_hinder_nobody(exported: Path, images: Any) -> None:
    with ExitStack() as stack:
        options = ("-S", f"body_seconds={BODY_SECONDS}")
        server, predict = stack.enter_context(started(exported, images, *options))
        whole = json_request("POST", predict, {"images": images})
        before = server.footprint
        stalled = []
        for sent in (b"", b"POST /tas", whole[:60], whole[:-10]) * 25:
            client = socket.create_connection((HOST, server.port), timeout=BODY_SECONDS + SLACK)
            stack.callback(client.close)
            client.sendall(sent)
            stalled.append(client)
        start = time.monotonic()
        assert server.request("POST", predict, {"images": images}, wait=5).status == 200
        assert time.monotonic() - start < SLACK
        for number, client in enumerate(stalled):
            last = b""
            try:
                while received := client.recv(4096):
                    last = received
            except TimeoutError:
                pytest.fail(f"client {number} is still connected after {last!r}")
            except ConnectionResetError:
                pass
        time.sleep(0.2)
        assert server.footprint.files <= before.files


def test_more_connections_than_it_takes_are_served_or_told_to_come_back(
    exported: Path, images: Any
) -> None:
    with started(exported, images) as (server, predict), ExitStack() as stack:
        request = json_request("POST", predict, {"images": images})
        before = server.footprint
        clients = []
        for _ in range(800):
            client = socket.create_connection((HOST, server.port), timeout=60)
            stack.callback(client.close)
            clients.append(client)
        for client in clients:
            client.sendall(request)
        heads = [client.recv(4096).split(b"\r\n\r\n")[0].lower() for client in clients]
        statuses = {int(head.split()[1]) for head in heads}
        assert statuses <= {200, 429, 503}
        assert 200 in statuses
        assert all(b"retry-after: " in head for head in heads if b" 200 " not in head[:15])
        stack.close()
        time.sleep(1)
        assert server.request("POST", predict, {"images": images}).status == 200
        until = time.monotonic() + 20
        while server.footprint.files > before.files:  # the last of them are being closed
            assert time.monotonic() < until
            time.sleep(0.2)


def test_what_waits_to_be_learnt_is_dropped_when_its_client_hangs_up(
    exported: Path, images: Any
) -> None:
    def pending(server: Server) -> int:
        told = server.request("GET", "/metrics").body.decode()
        (line,) = (x for x in told.splitlines() if x.startswith("reptile_adaptations_pending "))
        return int(float(line.split()[1]))

    with started(exported, images) as (server, _):
        steps = FewShotModel.load(exported).bundle.max_steps
        lesson = {"images": images, "labels": LABELS, "steps": steps}
        asked = json_request("POST", "/tasks", lesson)
        with ExitStack() as stack:
            clients = []
            for number in range(1, 7):
                clients.append(socket.create_connection((HOST, server.port), timeout=60))
                stack.callback(clients[-1].close)
                clients[-1].sendall(asked)
                until = time.monotonic() + SLACK
                while pending(server) < number:
                    assert time.monotonic() < until
            for client in clients[2:]:
                client.close()
            until = time.monotonic() + SLACK
            while pending(server) > 2:
                assert time.monotonic() < until
            heads = [client.recv(4096)[:12] for client in clients[:2]]
            assert heads == [b"HTTP/1.1 201"] * 2
        assert len(server.request("GET", "/tasks").json()["tasks"]) == 1 + 2
        assert server.log.count('"status":499') == 4


LARGE = {
    "empty lists": b'{"images": [' + b"[]," * (16 * MIB // 3 - 20) + b"[]]}",
    "empty objects": b'{"images": [' + b"{}," * (16 * MIB // 3 - 20) + b"{}]}",
    "numbers": b'{"images": [' + b"0.1," * (16 * MIB // 4 - 20) + b"1]}",
    "keys": b"{"
    + b",".join(b'"%x":0' % n for n in range(16 * MIB // 11))[: 16 * MIB - 50]
    + b'":0}',
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE)
def test_large_bodies_at_once_fit_a_machine_of_a_gigabyte(
    kind: str, exported: Path, images: Any
) -> None:
    with started(exported, images) as (server, predict):
        places = ("/tasks", predict, "/v2/models/few_shot/infer", "/v2/models/predict/infer") * 4
        head = {"content-type": "application/json"}

        def ask(place: str) -> int:
            try:
                return server.request("POST", place, LARGE[kind], head, wait=120).status
            except OSError:
                return 413  # refused before it was read

        with ThreadPoolExecutor(len(places)) as pool:
            answers = [pool.submit(ask, place) for place in places]
            time.sleep(0.5)
            start = time.monotonic()
            assert server.request("GET", "/v2/health/live").status == 200
            waited = time.monotonic() - start
        assert {answer.result() for answer in answers} <= {400, 413, 422, 429, 503}
        assert server.footprint.peak < 1024 * MIB
        assert waited < SLACK
        assert server.request("POST", predict, {"images": images}).status == 200


@pytest.mark.slow
def test_many_large_pictures_are_stopped_in_time_and_others_are_served(
    exported: Path, images: Any
) -> None:
    with started(exported, images, "-S", "request_seconds=5") as (server, predict):
        files = [(name, "a.png", pictures.large_png()) for name in ("cat", "dog")]
        body, kind = multipart(files * 100)
        done: list[Answer] = []
        start = time.monotonic()
        thread = threading.Thread(
            target=lambda: done.append(
                server.request("POST", "/tasks", body, {"content-type": kind})
            )
        )
        thread.start()
        time.sleep(0.5)
        assert server.request("POST", predict, {"images": images}).status == 200
        assert time.monotonic() - start < SLACK
        thread.join()
        assert done[0].status in {400, 413, 422, 503}, done
        assert time.monotonic() - start < 5 + SLACK
        # Whatever worked on them has stopped: two good pictures are not kept waiting.
        small = [(name, "a.png", pictures.png()) for name in ("cat", "dog")]
        body, kind = multipart(small)
        answer = server.request("POST", "/tasks?steps=1", body, {"content-type": kind})
        assert answer.status == 201
        assert server.footprint.peak < 1024 * MIB


class Exchange(NamedTuple):
    sent: float
    status: int | None  # None if the connection ended without an answer


def test_sigterm_under_load_answers_what_is_under_way_and_exits_with_0(
    exported: Path, images: Any, tmp_path: Path
) -> None:
    options = ("--tasks", str(tmp_path / "tasks"))
    with started(exported, images, *options) as (server, predict):
        steps = FewShotModel.load(exported).bundle.max_steps
        task = {"images": images, "labels": LABELS, "steps": steps}
        exchanges: list[Exchange] = []
        created: list[str] = []

        def ask(place: str, body: Any) -> None:
            while True:
                sent = time.monotonic()
                try:
                    answer = server.request("POST", place, body)
                except (OSError, http.client.HTTPException):
                    exchanges.append(Exchange(sent, None))
                    return
                exchanges.append(Exchange(sent, answer.status))
                if answer.status == 201:
                    created.append(answer.json()["id"])
                elif answer.status == 429:
                    time.sleep(0.2)
                elif answer.status != 200:
                    return

        with ThreadPoolExecutor(10) as pool:
            for _ in range(8):
                pool.submit(ask, predict, {"images": images})
            for _ in range(2):
                pool.submit(ask, "/tasks", task)
            time.sleep(1)
            ended = time.monotonic()
            assert server.stop() == 0, server.log[-3000:]
        under_way = [one for one in exchanges if one.sent < ended - 0.1]
        assert len(under_way) > 20
        assert {one.status for one in under_way} <= {200, 201, 429}
        assert {one.status for one in exchanges} <= {200, 201, 429, 503, None}
        assert "Traceback" not in server.log
        first = predict.split("/")[2]
        kept = {file.stem for file in (tmp_path / "tasks").glob("*.safetensors")}
        assert kept == {first, *created}
