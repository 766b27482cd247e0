"""What every request passes: an id, the token, bounds on body and time, a log line, the metrics.

Plain ASGI, so that nothing of a body is read before it has been bounded.
"""

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Mapping

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reptile.serve.refusals import FAULT
from reptile.serve.settings import ServeSettings

log = structlog.get_logger("reptile.serve")

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
GONE = 499  # logged for a client that hung up while it sent
# Answered without the token: a page is asked for by browsers, which have no place for one.
OPEN = re.compile(r"/|/page/.*|/ort/.*|/v2/health/(live|ready)")
REQUEST_ID = re.compile(rb"[\w.:-]{1,100}")


class _Request:
    """A request under way; cancelled when it is late. asyncio.timeout costs several times more."""

    def __init__(self, settings: ServeSettings) -> None:
        self.size = 0  # bytes of its body that are here
        self.complete = False  # its body is
        self.late = False
        self._whole = settings.request_seconds
        self._body = min(settings.body_seconds, self._whole)
        self.task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._start = self._loop.time()
        self._timer = self._loop.call_at(self._start + self._body, self._check)

    def _check(self) -> None:
        until = self._start + (self._whole if self.complete else self._body)
        if self._loop.time() < until:
            self._timer = self._loop.call_at(until, self._check)
        elif self.task:
            self.late = self.task.cancel()

    def end(self) -> None:
        self._timer.cancel()


class Guard:
    """Wraps the application."""

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, token: str | None, registry: CollectorRegistry
    ) -> None:
        self._app, self._settings, self._token = app, settings, token
        self._requests = 0  # that are being answered
        self._held = 0  # bytes of all their bodies
        self._seconds = Histogram(
            "reptile_request_seconds",
            "From a request's start to its answer's end.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._refused = Counter(
            "reptile_refused_requests",
            "Requests refused, by reason.",
            ["reason"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16).encode()
        start, status = time.perf_counter(), 0

        async def respond(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        if refusal := self._refusal(scope["path"], headers):
            await refusal(scope, receive, respond)
        else:
            self._requests += 1
            request = _Request(self._settings)
            try:
                await self._app(scope, self._bounded(receive, request), respond)
            except asyncio.CancelledError:
                if not request.late or not request.task:
                    raise
                request.task.uncancel()
                refusal = self._late(request)
                if not status:
                    await refusal(scope, receive, respond)
            except ClientDisconnect:
                status = GONE
            except Exception:
                log.exception("failed", id=request_id.decode())
                if not status:
                    await JSONResponse({"error": FAULT}, 500)(scope, receive, respond)
            finally:
                request.end()
                self._requests -= 1
                self._held -= request.size
        seconds = time.perf_counter() - start
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._seconds.labels(route, method, status).observe(seconds)
        log.info(
            "request",
            id=request_id.decode(),
            method=method,
            path=scope["path"][:200],
            status=status,
            milliseconds=round(1000 * seconds, 1),
        )

    def _refusal(self, path: str, headers: Mapping[bytes, bytes]) -> JSONResponse | None:
        if self._requests >= self._settings.connections:
            self._refused.labels("connections").inc()
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
                self._refused.labels("token").inc()
                return JSONResponse(
                    {"error": "send the server's token as `Authorization: Bearer TOKEN`"},
                    401,
                    {"www-authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._settings.max_body_bytes:
            self._refused.labels("body").inc()
            return JSONResponse({"error": self._too_large()}, 413, {"connection": "close"})
        return None

    def _late(self, request: _Request) -> JSONResponse:
        if request.complete:
            self._refused.labels("deadline").inc()
            late = f"no answer within {self._settings.request_seconds:g} s; try again"
            return JSONResponse({"error": late}, 503, {"retry-after": "1"})
        self._refused.labels("slow").inc()
        late = f"the body did not arrive within {self._settings.body_seconds:g} s"
        return JSONResponse({"error": late}, 408, {"connection": "close"})

    def _bounded(self, receive: Receive, request: _Request) -> Receive:
        async def bounded() -> Message:
            if request.complete:  # what comes now is the end of the connection, however late
                return await receive()
            message = await receive()
            received = len(message.get("body", b""))
            request.size += received
            self._held += received
            request.complete = not message.get("more_body", False)
            if request.size > self._settings.max_body_bytes:
                self._refused.labels("body").inc()
                raise HTTPException(413, self._too_large(), {"connection": "close"})
            if self._held > self._settings.max_held_bytes:
                self._refused.labels("held").inc()
                full = "too much is being sent at once; try again in 1 s"
                raise HTTPException(429, full, {"connection": "close", "retry-after": "1"})
            return message

        return bounded

    def _too_large(self) -> str:
        return f"the body is larger than {self._settings.max_body_bytes} bytes"
