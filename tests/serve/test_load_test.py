"""The load test: its clients against a server whose answers are known, and that it runs."""

import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.load import Clients, Load, Order
from benchmarks.server import HOST, json_request
from benchmarks.serving import ADAPT, CLIENTS, DIRECT, PREDICT, PREDICT_BUSY, QUICK, measure

SECONDS = 0.02  # that the known server takes


class Known(socketserver.StreamRequestHandler):
    """Answers each connection's requests by turns: well twice, busy, then hangs up."""

    def handle(self) -> None:
        for answer in (b"200 OK", b"201 Created", b"429 Too Many Requests"):
            size = 0
            while line := self.rfile.readline().strip():
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split(b":")[1])
            if not size:
                return
            assert json.loads(self.rfile.read(size)) == {"a": 1}
            time.sleep(SECONDS)
            head = b"HTTP/1.1 " + answer + b"\r\nContent-Length: 5\r\nRetry-After: 0\r\n\r\n"
            self.wfile.write(head + b"ab")
            self.wfile.flush()
            time.sleep(SECONDS)  # an answer that comes in pieces is done with its last one
            self.wfile.write(b"cde")


@pytest.fixture
def known() -> Iterator[int]:
    with socketserver.ThreadingTCPServer((HOST, 0), Known) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def asked(port: int, clients: int) -> Load:
    request = json_request("POST", "/", {"a": 1}).decode("latin-1")
    return Clients(Order(HOST, port, request, clients, seconds=1.0, warm_up=0.1)).result()


@pytest.mark.parametrize("clients", [1, 5])
def test_clients_time_whole_answers_and_count_what_failed(known: int, clients: int) -> None:
    load = asked(known, clients)
    assert min(load.milliseconds) >= 2 * SECONDS * 1e3
    assert len(load.milliseconds) == load.statuses["200"] + load.statuses["201"]
    # Two of three answers are good, and after the third the connection ends.
    assert load.statuses["200"] == pytest.approx(load.statuses["201"], abs=clients + 1)
    assert load.statuses["429"] == pytest.approx(load.statuses["200"], abs=clients + 1)
    assert load.broken == pytest.approx(load.statuses["429"], abs=clients + 1)
    most = clients * load.seconds / (2 * SECONDS)  # each waits for its answer before it asks again
    assert most / 4 < sum(load.statuses.values()) < most + clients
    assert 0 < load.cpu_seconds < load.seconds


def test_the_load_test_measures_what_it_says(exported: Path) -> None:
    results = measure(exported, QUICK)
    lines = {(line.label, line.clients): line for line in results.lines}
    assert results.quick
    assert results.machine.versions["onnxruntime"]
    assert {clients for label, clients in lines if label == PREDICT} == set(CLIENTS)
    for line in results.lines:
        assert line.served > 0
        assert line.broken == 0
        assert line.statuses.keys() <= {"200", "201", "429"}
        assert 0 < line.p50 <= line.p95 <= line.p99
    many, direct = lines[PREDICT, CLIENTS[-1]], lines[DIRECT, 1]
    assert many.ratio is not None
    assert many.ratio.median == pytest.approx(many.per_second[0] / direct.per_second[0])
    assert many.within_limit is (many.ratio.median >= 0.5)
    busy, idle = lines[PREDICT_BUSY, 8], lines[PREDICT, 8]
    assert busy.ratio is not None
    assert busy.ratio.median == pytest.approx(busy.p99s[0] / idle.p99s[0])
    assert busy.within_limit is (busy.ratio.median < 5)
    assert lines[ADAPT, 1].statuses.keys() == {"201"}


def test_the_command_prints_one_table_and_keeps_every_round(
    closed_form_bundle: Path, root: Path, tmp_path: Path
) -> None:
    file = tmp_path / "load.json"
    options = ("--quick", "--markdown", "--json", str(file))
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", str(closed_form_bundle), *options],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "a quick run" in ran.stderr
    rows = [line for line in ran.stdout.splitlines() if line.startswith("| ")]
    kept = json.loads(file.read_bytes())
    assert len(rows) == 2 + len(kept["lines"])
    assert len({row.count("|") for row in rows}) == 1
    assert kept["machine"]["cpus"] >= 1
    assert kept["serving_versions"].keys() >= {"starlette", "uvicorn"}
