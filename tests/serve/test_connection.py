"""The connection: offers of an upgrade, and refusals that arrive; a real server and raw sockets."""

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.server import Server

LIMIT = 2**20


@pytest.fixture
def server(exported: Path) -> Iterator[Server]:
    with Server(exported, "-S", f"max_body_bytes={LIMIT}") as started:
        yield started


def exchange(server: Server, *parts: bytes) -> bytes:
    """Send parts with pauses between; return all that comes within two seconds of silence."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(0.1)
        received = b""
        try:
            while more := client.recv(65536):
                received += more
        except TimeoutError:
            pass
        return received


BODY = b"GET /v2 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
HEAD = (
    b"POST /tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    b"Content-Length: %d\r\n\r\n" % len(BODY)
)


@pytest.mark.parametrize(
    "split", [len(HEAD), HEAD.index(b"Upgrade: h2c"), HEAD.index(b"grade: h2")]
)
def test_a_body_after_an_upgrade_s_offer_is_no_request_of_its_own(
    server: Server, split: int
) -> None:
    received = exchange(server, HEAD[:split], HEAD[split:], BODY)
    assert re.findall(rb"HTTP/1\.1 (\d+)", received) == [b"400"]
    assert b"not JSON" in received


def test_a_refusal_arrives_though_the_client_sends_all_of_its_body_first(server: Server) -> None:
    body = b"x" * (8 * LIMIT)
    for framing in (
        b"Content-Length: %d\r\n\r\n" % len(body),
        b"Transfer-Encoding: chunked\r\n\r\n",
    ):
        chunked = b"chunked" in framing
        sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
        head = b"POST /tasks HTTP/1.1\r\nHost: 127.0.0.1\r\n" + framing
        received = exchange(server, head, sent)
        assert received.startswith(b"HTTP/1.1 413"), received[:200]
        assert b"larger than" in received
