"""A closed loop of clients that repeat one request, in a separate process.

Each client waits for a response before it sends the next request, on a connection that stays open.
Plain sockets and the standard library only, so that a client costs little; its CPU time is
measured. Responses must have a Content-Length.

    python -m benchmarks.load < order.json > result.json
"""

import contextlib
import heapq
import json
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

RECV_BYTES = 1 << 16
DRAIN_SECONDS = 30.0  # seconds to wait for the first response, and for the last ones
TICK = 0.01  # seconds to wait for input before looking at the clock
_CODE = len("HTTP/1.1 ")  # where a response's status begins


class Order(NamedTuple):
    """What the clients send, and for how long."""

    host: str
    port: int
    request: str  # a whole HTTP/1.1 request, its bytes as latin-1
    clients: int
    seconds: float
    warm_up: float  # seconds before the clock starts


class Load(NamedTuple):
    """What the clients measured."""

    seconds: float  # of measurement
    milliseconds: list[
        float
    ]  # from the first byte of a request to the last of its response; 2xx only
    statuses: dict[str, int]  # number of responses with each status
    broken: int  # connections that ended without a response
    cpu_seconds: float  # used by the clients

    @property
    def per_second(self) -> float:
        """Successful requests per second."""
        return len(self.milliseconds) / self.seconds


@dataclass
class _Client:
    socket: socket.socket
    sent: float = 0.0
    got: bytearray = field(default_factory=bytearray)
    size: int = -1  # of the whole response, once its head has arrived


def run(order: Order) -> Load:
    """Send requests until the time is up and one has succeeded; wait for those in progress.

    A client that gets 429 or 503 waits as long as Retry-After says.
    """
    request = order.request.encode("latin-1")
    selector = selectors.DefaultSelector()
    later: list[tuple[float, int, _Client]] = []
    milliseconds: list[float] = []
    statuses: Counter[str] = Counter()
    broken = 0
    under_way: set[int] = set()

    def send(client: _Client) -> None:
        client.got.clear()
        client.size = -1
        under_way.add(id(client))
        client.sent = time.perf_counter()
        client.socket.sendall(request)

    def renew(client: _Client) -> None:
        if client.socket.fileno() >= 0:
            with contextlib.suppress(KeyError):
                selector.unregister(client.socket)
            client.socket.close()
        client.socket = socket.create_connection((order.host, order.port))
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(client.socket, selectors.EVENT_READ, client)
        send(client)

    clients = [_Client(socket.socket()) for _ in range(order.clients)]
    for client in clients:
        client.socket.close()
        renew(client)
    start = time.perf_counter() + order.warm_up
    end, counts, over = start + order.seconds, False, False
    cpu = seconds = 0.0
    while not over or (under_way and time.perf_counter() < end + DRAIN_SECONDS):
        now = time.perf_counter()
        if not counts and not over and now >= start:
            counts, start, cpu, broken = True, now, time.process_time(), 0
        if not over and now >= end and (milliseconds or now >= end + DRAIN_SECONDS):
            counts, over = False, True
            seconds, cpu = now - start, time.process_time() - cpu
        while later and not over and later[0][0] <= now:
            send(heapq.heappop(later)[2])
        for key, _ in selector.select(TICK):
            client = key.data
            try:
                received = client.socket.recv(RECV_BYTES)
            except OSError:
                received = b""
            if not received:
                broken += not over
                under_way.discard(id(client))
                if over:
                    selector.unregister(client.socket)
                else:
                    renew(client)
                continue
            client.got += received
            if client.size < 0 and (head := client.got.find(b"\r\n\r\n")) >= 0:
                client.size = head + 4 + int(_header(client.got[:head], b"content-length"))
            if not 0 <= client.size <= len(client.got):
                continue
            done = time.perf_counter()
            under_way.discard(id(client))
            status = client.got[_CODE : _CODE + 3].decode()
            if counts:
                statuses[status] += 1
                if status.startswith("2"):
                    milliseconds.append(1000 * (done - client.sent))
            if over:
                continue
            if status in ("429", "503"):
                pause = float(_header(client.got, b"retry-after"))
                heapq.heappush(later, (done + pause, id(client), client))
            else:
                send(client)
    for client in clients:
        client.socket.close()
    return Load(seconds, milliseconds, dict(statuses), broken, cpu)


def _header(head: bytes | bytearray, name: bytes) -> bytes:
    _, separator, rest = head.lower().partition(b"\r\n" + name + b":")
    if not separator:
        raise ValueError(f"a response without {name.decode()}: {bytes(head[:500])!r}")
    return bytes(rest.split(b"\r\n", 1)[0].strip())


class Clients:
    """Clients running in a separate process."""

    def __init__(self, order: Order) -> None:
        with tempfile.TemporaryFile("w+") as given:
            json.dump(order._asdict(), given)
            given.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.load"], stdin=given, stdout=subprocess.PIPE
            )

    def result(self) -> Load:
        """Wait until they end and return what they measured."""
        answer, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError("the clients failed; see above")
        return Load(**json.loads(answer))


def _main() -> None:
    order: dict[str, Any] = json.load(sys.stdin)
    json.dump(run(Order(**order))._asdict(), sys.stdout)


if __name__ == "__main__":
    _main()
