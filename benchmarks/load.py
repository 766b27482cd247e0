"""A closed loop of clients that send one request over and over, in a process of its own.

Each client waits for its answer before it asks again, on a connection that stays open. Plain
sockets and the standard library only, so that a client costs little beside what it measures; what
it does cost is counted. Reads answers that carry a Content-Length.

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
DRAIN_SECONDS = 30.0  # seconds to wait for a first answer, and for the last ones
TICK = 0.01  # seconds between looks at the clock while nothing comes
_CODE = len("HTTP/1.1 ")  # where an answer's status begins


class Order(NamedTuple):
    """What clients are to do."""

    host: str
    port: int
    request: str  # a whole HTTP/1.1 request, its bytes as latin-1
    clients: int
    seconds: float
    warm_up: float  # seconds before the clock starts


class Load(NamedTuple):
    """What clients found."""

    seconds: float  # that were counted
    milliseconds: list[float]  # from a request's first byte to its answer's last, of 2xx only
    statuses: dict[str, int]  # how many answers of each
    broken: int  # connections that ended without an answer
    cpu_seconds: float  # that the clients took themselves

    @property
    def per_second(self) -> float:
        """Requests that were served."""
        return len(self.milliseconds) / self.seconds


@dataclass
class _Client:
    socket: socket.socket
    sent: float = 0.0
    got: bytearray = field(default_factory=bytearray)
    size: int = -1  # of the whole answer, once its head is there


def run(order: Order) -> Load:
    """Send requests until the time is up and one was served; wait for what is under way then.

    A client that is told to come back later (429 or 503 with Retry-After) does so.
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
    _, found, rest = head.lower().partition(b"\r\n" + name + b":")
    if not found:
        raise ValueError(f"an answer without {name.decode()}: {bytes(head[:500])!r}")
    return bytes(rest.split(b"\r\n", 1)[0].strip())


class Clients:
    """Clients at work in a process of their own."""

    def __init__(self, order: Order) -> None:
        with tempfile.TemporaryFile("w+") as told:
            json.dump(order._asdict(), told)
            told.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.load"], stdin=told, stdout=subprocess.PIPE
            )

    def result(self) -> Load:
        """Wait until they are done and return what they found."""
        answer, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError("the clients failed; see above")
        return Load(**json.loads(answer))


def _main() -> None:
    order: dict[str, Any] = json.load(sys.stdin)
    json.dump(run(Order(**order))._asdict(), sys.stdout)


if __name__ == "__main__":
    _main()
