"""Bytes to a server and whatever comes back, over many connections at once; nothing is tidied."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from benchmarks.server import HOST

HANG_SECONDS = 90.0  # seconds without an answer after which a case has hung
MOMENT = 0.1  # seconds for a server to answer half a request, if it likes to


class Case(NamedTuple):
    """One attack."""

    name: str
    sent: tuple[bytes | float, ...]  # bytes, and between them pauses in seconds
    statuses: frozenset[int] | None = None  # all that will do; None for whatever is no failure
    answered: bool = True  # whether no answer is a failure
    ends: bool = False  # not a whole request: says after a moment that no more will come
    closes: bool = False  # hangs up without waiting for an answer
    malformed: bool = False  # no HTTP: the answer need not be this server's JSON
    bodiless: bool = False  # an answer to HEAD


class Reply(NamedTuple):
    """What came back: status 0 where the connection ended without an answer, -1 after a hang."""

    status: int
    headers: dict[str, str]
    body: bytes


class Verdict(NamedTuple):
    """What became of a case."""

    name: str
    status: int
    complaint: str | None


SILENCE, HANG = Reply(0, {}, b""), Reply(-1, {}, b"")


async def attack(port: int, case: Case) -> Reply:
    """Send one case on a connection of its own."""
    try:
        async with asyncio.timeout(HANG_SECONDS):
            return await _attack(port, case)
    except TimeoutError:
        return HANG if case.answered else SILENCE


async def attack_all(
    port: int,
    cases: Iterable[Case],
    connections: int,
    judge: Callable[[Case, Reply], str | None],
) -> list[Verdict]:
    """Send all cases, that many at a time, and judge each reply as it comes."""
    waiting: Iterator[Case] = iter(cases)
    found: list[Verdict] = []

    async def work() -> None:
        for case in waiting:
            reply = await attack(port, case)
            found.append(Verdict(case.name, reply.status, judge(case, reply)))

    await asyncio.gather(*(work() for _ in range(connections)))
    return found


async def _attack(port: int, case: Case) -> Reply:
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 26)
    try:
        sending = asyncio.create_task(_send(writer, case))
        if case.closes:
            await sending
            return SILENCE
        try:
            # It may answer and hang up before all is sent.
            return await _read(reader, case.bodiless)
        except (asyncio.IncompleteReadError, ConnectionError):
            return SILENCE
        finally:
            sending.cancel()
    finally:
        writer.transport.abort()


async def _send(writer: asyncio.StreamWriter, case: Case) -> None:
    try:
        for part in case.sent:
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                writer.write(part)
                await writer.drain()
        if case.ends:
            await asyncio.sleep(MOMENT)
            writer.write_eof()
    except (ConnectionError, RuntimeError):
        pass


async def _read(reader: asyncio.StreamReader, bodiless: bool) -> Reply:
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        status = int(first.split(" ")[1])
        if status >= 200:
            break
    pairs = (line.partition(":") for line in lines if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if bodiless or status == 204:
        return Reply(status, headers, b"")
    if "content-length" in headers:
        return Reply(status, headers, await reader.readexactly(int(headers["content-length"])))
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        return Reply(status, headers, body)
    return Reply(status, headers, await reader.read())
