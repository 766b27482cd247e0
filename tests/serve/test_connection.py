"""The connection: offers of an upgrade, and refusals that arrive; a real server and raw sockets."""

import re
import socket
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest

from benchmarks.server import Server

LIMIT = 2**20


@pytest.fixture(scope="module")
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


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
AGAIN = b"POST /v2/models/x/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n%sContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize("together", [True, False], ids=["in one packet", "one after another"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_every_request_of_a_connection_may_offer_an_upgrade(
    server: Server, together: bool, framing: str
) -> None:
    """As Java's client, which offers it with each request and keeps its connections."""
    one = AGAIN % OFFER
    if framing == "chunks":
        one = one.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked")
        one = one.replace(b"\r\n\r\n{}", b"\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
    requests = [AGAIN % b"", one, one, AGAIN % b"", one, AGAIN % b"Connection: close\r\n"]
    received = exchange(server, *([b"".join(requests)] if together else requests))
    assert re.findall(rb"HTTP/1\.1 (\d+)", received) == [b"404"] * 6
    assert received.count(b"no model 'x'") == 6  # none was cut short or read as another


CLOSES = b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def test_many_offers_in_one_packet_do_no_harm(server: Server) -> None:
    offers = b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" * 2000
    assert exchange(server, offers + CLOSES).count(b"HTTP/1.1 200") == 2001
    assert "Traceback" not in server.log


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


def test_a_refusal_arrives_whatever_the_client_does_with_its_body(server: Server) -> None:
    """Refused for its path, method or type before the body is read, not for its size."""
    body = b"x" * (LIMIT - 1)
    for request in ("POST /nowhere", "PUT /tasks", "POST /tasks"):
        for more in ("Connection: close\r\n", "", "Content-Type: text/xml\r\n"):
            head = f"{request} HTTP/1.1\r\nHost: 127.0.0.1\r\n{more}"
            sent = head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            received = exchange(server, sent)
            assert re.match(rb"HTTP/1\.1 4(00|04|05|15) ", received), (head, received[:100])
            assert b'{"error":' in received


def test_a_refusal_before_the_body_is_asked_for_ends_the_connection(server: Server) -> None:
    """The client does not send the body then: what follows would be taken for it."""
    head = b"POST /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\n"
    received = exchange(server, head + b"Content-Length: 100\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 404") and b"100 Continue" not in received
    assert b"connection: close" in received


def test_the_rest_of_a_refused_body_ends_the_connection(server: Server) -> None:
    """An answer that came before the body's end leaves no connection that nothing times out."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n\r\n")
        answer = HTTPResponse(client)
        answer.begin()
        assert answer.status == 404 and answer.read()
        client.sendall(b"hello")
        assert client.recv(65536) == b""


CHUNKED = (
    b"GET /v2 HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: close\r\n\r\n"
    b"5;extension=1\r\nhello\r\n0\r\n"
)


def test_trailers_are_no_headers(server: Server) -> None:
    """A proxy checks and sets headers; it may pass trailers on unseen."""
    trailers = b"Host: evil.test\r\nX-Request-Id: trailer\r\nContent-Encoding: gzip\r\n\r\n"
    received = exchange(server, CHUNKED + trailers)
    assert received.startswith(b"HTTP/1.1 200") and b"x-request-id: trailer" not in received


@pytest.mark.parametrize("endless", [b"X: " + b"a" * 997, b"X: a\r\n" * 166])
def test_endless_trailers_are_not_kept(server: Server, endless: bytes) -> None:
    port, peak = int(server.url.rpartition(":")[2]), server.footprint.peak
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(CHUNKED.replace(b"GET /v2", b"POST /tasks"))
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            for _ in range(50_000):  # 50 MB
                client.sendall(endless)
    assert server.footprint.peak - peak < 10 << 20


def test_another_transfer_coding_is_refused(server: Server) -> None:
    sent = CHUNKED.replace(b"Encoding: chunked", b"Encoding: gzip, chunked") + b"\r\n"
    received = exchange(server, sent)
    assert received.startswith(b"HTTP/1.1 400") and b"send `chunked` alone" in received


def test_a_page_of_another_port_of_the_same_host_is_another_site(server: Server) -> None:
    """`--host` does not open the server to whatever else runs there; browsers of old send no
    Sec-Fetch-Site."""
    assert server.request("GET", "/tasks", headers={"origin": server.url}).status == 200
    for other in ("http://127.0.0.1", "http://127.0.0.1:1", f"https://localhost:{server.port}"):
        assert server.request("GET", "/tasks", headers={"origin": other}).status == 403, other
