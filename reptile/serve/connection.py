"""A connection whose requests' heads must arrive soon and be short.

uvicorn waits without limit for a head that does not come, keeps all of one that does not end, and
takes the trailers after a body for headers; httptools does not read the body of a request that
offers an upgrade, such as `Upgrade: h2c`.
"""

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
HEAD_BYTES = 2**15
UPGRADE = re.compile(rb"\nupgrade(?=[ \t]*:)", re.IGNORECASE)


class Connection(HttpToolsProtocol):
    """Closes when a request's head is late or too long; requests that have begun are answered."""

    _since: float | None = None  # when it began to wait for a head
    _pending = 0  # bytes since the last head or part of a body; such as of a head not complete
    _ended = False  # whatever else is received is ignored
    _timer: asyncio.TimerHandle | None = None  # one for all heads

    def connection_made(self, transport: Any) -> None:
        """Expect a first head, unless there are too many connections."""
        super().connection_made(transport)
        if self.limit_concurrency and len(self.connections) > self.limit_concurrency:
            transport.close()  # uvicorn refuses requests, but keeps connections that ask nothing
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what was received; decline upgrades, and close after a head that is too long."""
        if self._ended:
            return
        if self._since is not None:
            head, end, body = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(b"\nX-Upgrade", head) + end + body  # an offer, which is declined
        self._pending += len(data)
        super().data_received(data)
        if self._pending > HEAD_BYTES:
            self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Close after the answer: an offer split between packets was seen by the parser alone.

        What follows is the request's body, which the parser would read as another request.
        """
        self._ended = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def on_message_begin(self) -> None:
        """Expect the head that begins."""
        super().on_message_begin()
        self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; not a trailer, which a proxy has not checked."""
        if self._since is not None:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop waiting for the head."""
        self._since, self._pending = None, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._pending = 0
        super().on_body(body)

    def _expect_head(self) -> None:
        self._since, self._pending = self.loop.time(), 0
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._check)

    def _check(self) -> None:
        self._timer = None
        if self._since is None:
            return
        left = self._since + HEAD_SECONDS - self.loop.time()
        if left <= 0:
            self.transport.close()
        else:
            self._timer = self.loop.call_later(left, self._check)
