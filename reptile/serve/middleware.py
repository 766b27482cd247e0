"""What every request passes: an id, the token, bounds on body and time, a log line, the metrics.

Plain ASGI, so that nothing of a body is read before it has been bounded.
"""

import asyncio
import hmac
import itertools
import logging
import re
import secrets
import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reptile.serve.access_log import Ended, Journal
from reptile.serve.errors import FAULT
from reptile.serve.settings import ServeSettings

log = logging.getLogger(__name__)
numbers = itertools.count(1)

GONE = 499  # logged for a client that hung up while it sent
TICK = 0.1  # seconds between looks for requests that are late
# Answered without the token: a page is asked for by browsers, which have no place for one.
OPEN = re.compile(r"/|/page/.*|/ort/.*|/v2/health/(live|ready)")
REQUEST_ID = re.compile(rb"[\w.:-]{1,100}")
PROCESS = secrets.token_hex(8)  # so that its ids are not another's


class _Request:
    """A request under way: its bounds on body and time, and what was answered."""

    def __init__(
        self, guard: "Guard", settings: ServeSettings, given_id: bytes, receive: Receive, send: Send
    ) -> None:
        self._guard, self._settings, self._receive, self._send = guard, settings, receive, send
        known = REQUEST_ID.fullmatch(given_id)
        self.id = given_id.decode() if known else f"{PROCESS}-{next(numbers)}"
        self.task = asyncio.current_task()
        self.start = time.monotonic()
        self.until = self.start + min(settings.body_seconds, settings.request_seconds)
        self.late = False  # and cancelled for it
        self.status = 0  # of the answer, once it began
        self.size = 0  # bytes of its body that are here
        self.complete = False  # its body is

    async def send(self, message: Message) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.id.encode())]
        await self._send(message)

    async def receive(self) -> Message:
        """See ASGI."""
        message = await self._receive()
        if self.complete:  # what comes now is the end of the connection, however late
            return message
        guard, settings = self._guard, self._settings
        received = len(message.get("body", b""))
        self.size += received
        guard.held += received
        if not message.get("more_body", False):
            self.complete = True
            self.until = self.start + settings.request_seconds
        if self.size > settings.max_body_bytes:
            guard.refused.labels("body").inc()
            raise HTTPException(413, _too_large(settings), {"connection": "close"})
        if guard.held > settings.max_held_bytes:
            guard.refused.labels("held").inc()
            full = "too much is being sent at once; try again in 1 s"
            raise HTTPException(429, full, {"connection": "close", "retry-after": "1"})
        return message


class Guard:
    """Wraps the application."""

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, token: str | None, registry: CollectorRegistry
    ) -> None:
        self._app, self._settings, self._token = app, settings, token
        self._journal = Journal(registry)
        self._under_way: set[_Request] = set()
        self.held = 0  # bytes of all their bodies
        self.refused = Counter(
            "reptile_refused_requests",
            "Requests refused, by reason.",
            ["reason"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            ending = asyncio.create_task(self._end_late())
            try:
                await self._app(scope, receive, send)
            finally:
                ending.cancel()
            return
        headers = dict(scope["headers"])
        request = _Request(self, self._settings, headers.get(b"x-request-id", b""), receive, send)
        if refusal := self._refusal(scope["path"], headers):
            await refusal(scope, receive, request.send)
        else:
            self._under_way.add(request)
            try:
                await self._app(scope, request.receive, request.send)
            except asyncio.CancelledError:
                if not request.late or not request.task:
                    raise
                request.task.uncancel()
                refusal = self._late(request)
                if not request.status:
                    await refusal(scope, receive, request.send)
            except ClientDisconnect:
                request.status = GONE
            except Exception:
                log.exception("failed", extra={"events": [{"id": request.id}]})
                if not request.status:
                    await JSONResponse({"error": FAULT}, 500)(scope, receive, request.send)
            finally:
                self._under_way.remove(request)
                self.held -= request.size
        self._journal.add(
            Ended(
                request.id,
                scope["method"],
                scope["path"],
                getattr(scope.get("route"), "path", "unknown"),
                request.status,
                time.monotonic() - request.start,
            )
        )

    async def _end_late(self) -> None:
        """Look for requests that are late; a timer for each would cost more than a prediction."""
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for request in self._under_way:
                if now >= request.until and request.task and not request.late:
                    request.late = request.task.cancel()

    def _refusal(self, path: str, headers: Mapping[bytes, bytes]) -> JSONResponse | None:
        if len(self._under_way) >= self._settings.connections:
            self.refused.labels("connections").inc()
            return JSONResponse(
                {"error": f"more than {self._settings.connections} requests at once; try again"},
                503,
                {"retry-after": "1"},
            )
        if self._token and not OPEN.fullmatch(path):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(
                given.strip(), self._token.encode()
            ):
                self.refused.labels("token").inc()
                return JSONResponse(
                    {"error": "send the server's token as `Authorization: Bearer TOKEN`"},
                    401,
                    {"www-authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._settings.max_body_bytes:
            self.refused.labels("body").inc()
            return JSONResponse({"error": _too_large(self._settings)}, 413, {"connection": "close"})
        return None

    def _late(self, request: _Request) -> JSONResponse:
        if request.complete:
            self.refused.labels("deadline").inc()
            late = f"no answer within {self._settings.request_seconds:g} s; try again"
            return JSONResponse({"error": late}, 503, {"retry-after": "1"})
        self.refused.labels("slow").inc()
        late = f"the body did not arrive within {self._settings.body_seconds:g} s"
        return JSONResponse({"error": late}, 408, {"connection": "close"})


def _too_large(settings: ServeSettings) -> str:
    return f"the body is larger than {settings.max_body_bytes} bytes"
