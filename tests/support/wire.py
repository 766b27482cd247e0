"""Sends raw bytes to a server over many connections at once and returns the raw responses."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from benchmarks.server import HOST

HANG_SECONDS = 90.0  # seconds without a response after which a case counts as hung
MOMENT = 0.1  # seconds in which a server may respond to half a request


class Case(NamedTuple):
    """One attack."""

    name: str
    sent: tuple[bytes | float, ...]  # bytes, with pauses in seconds between them
    statuses: frozenset[int] | None = (
        None  # the accepted ones; None accepts all that are no failure
    )
    answered: bool = True  # whether no response is a failure
    ends: bool = False  # an incomplete request, whose sending side is closed after a moment
    closes: bool = False  # disconnects without waiting for a response
    malformed: bool = False  # not HTTP: the response need not be this server's JSON
    bodiless: bool = False  # a response to HEAD


class Reply(NamedTuple):
    """A response; status 0 if the connection ended without one, -1 after a hang."""

    status: int
    headers: dict[str, str]
    body: bytes


class Verdict(NamedTuple):
    """The outcome of a case."""

    name: str
    status: int
    complaint: str | None


SILENCE, HANG = Reply(0, {}, b""), Reply(-1, {}, b"")


async def attack(port: int, case: Case) -> Reply:
    """Send one case on a new connection."""
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
    """Send all cases over that many connections, and judge each reply."""
    waiting: Iterator[Case] = iter(cases)
    verdicts: list[Verdict] = []

    async def work() -> None:
        for case in waiting:
            reply = await attack(port, case)
            verdicts.append(Verdict(case.name, reply.status, judge(case, reply)))

    await asyncio.gather(*(work() for _ in range(connections)))
    return verdicts


async def _attack(port: int, case: Case) -> Reply:
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 26)
    try:
        sending = asyncio.create_task(_send(writer, case))
        if case.closes:
            await sending
            return SILENCE
        try:
            # It may respond and disconnect before all is sent.
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
