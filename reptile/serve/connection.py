"""A connection whose requests' heads must arrive soon and be short.

uvicorn waits without limit for a head that does not come, keeps all of one that does not end, and
takes the trailers after a body for headers; httptools does not read the body of a request that
offers an upgrade, such as `Upgrade: h2c`.
"""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
HEAD_BYTES = 2**15


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
        self._unset_keepalive_if_required()
        self._pending += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        if self._pending > HEAD_BYTES:
            self.transport.close()

    def _parse(self, data: bytes) -> None:
        parts = [memoryview(data)]
        while parts:
            part = parts.pop()
            try:
                self.parser.feed_data(part)
            except httptools.HttpParserUpgrade as upgrade:
                if not self._offers_upgrade():  # CONNECT: no further request can follow
                    self._ended = True
                    self.cycle.keep_alive = False
                    return
                # The parser would skip the body: it gets the head again, without the offer.
                parts += [part[upgrade.args[0] :], memoryview(self._head_without_offer())]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn

    def _head_without_offer(self) -> bytes:
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        head = b"%s %s HTTP/%s\r\n" % (method, self.url, version)
        kept = [b"%s: %s\r\n" % each for each in self.headers if each[0] != b"upgrade"]
        return head + b"".join(kept) + b"\r\n"

    def _offers_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

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
        if not self._offers_upgrade():
            self._since, self._pending = None, 0
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End the body, unless its head is to be parsed again."""
        if not self._offers_upgrade():
            super().on_message_complete()

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
