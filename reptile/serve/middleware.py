"""The ASGI middleware of every request: id, token, origin, limits on body and time, log, metrics.

Plain ASGI, so that nothing of a body is read before it has been bounded.
"""

import asyncio
import hmac
import ipaddress
import itertools
import logging
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reptile.serve.access_log import AccessLog, Ended
from reptile.serve.errors import FAULT
from reptile.serve.settings import ServeSettings

log = logging.getLogger(__name__)
numbers = itertools.count(1)

GONE = 499  # logged for a client that hung up while it sent
TICK = 0.1  # seconds between looks for requests that are late
# Answered without the token: a browser that opens the page has no way to send one.
OPEN = re.compile(r"/|/page/.*|/ort/.*|/v2/health/(live|ready)")
# Show or change tasks or the bundle: not for pages of other sites.
GUARDED = re.compile(r"/tasks(/.*)?|/v2/models/.*|/bundle/.*|/metrics")
ONCE = (
    *(b"authorization", b"content-encoding", b"content-length", b"content-type", b"host"),
    *(b"inference-header-content-length", b"origin", b"sec-fetch-site", b"transfer-encoding"),
)
"""Headers of which two would be read in different ways, here and by a proxy."""
# No page of another site shows an answer in a frame of its own, or takes it for a script.
SAFE = ((b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"))
HOST = re.compile(r"(?:\[([0-9a-f:.%]+)\]|([^\[\]:/@]*?)\.?)(?::[0-9]*)?")
REQUEST_ID = re.compile(rb"[\w.:-]{1,100}")
LINGER_SECONDS = 5.0  # for a client to finish sending a body that was refused
PROCESS = secrets.token_hex(8)  # makes request ids unique among processes


class _Request:
    """A request under way: its bounds on body and time, and what was answered."""

    def __init__(
        self,
        middleware: "RequestMiddleware",
        settings: ServeSettings,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        send: Send,
    ) -> None:
        self._middleware, self._settings, self._receive, self._send = (
            middleware,
            settings,
            receive,
            send,
        )
        given_id = headers.get(b"x-request-id", b"")
        known = REQUEST_ID.fullmatch(given_id)
        self.id = given_id.decode() if known else f"{PROCESS}-{next(numbers)}"
        self.task = asyncio.current_task()
        self.start = time.monotonic()
        self.until = self.start + min(settings.body_seconds, settings.request_seconds)
        self.late = False  # and cancelled for it
        self.status = 0  # of the answer, once it began
        self.size = 0  # bytes of its body that are here
        self.complete = False  # its body is, as far as it was asked for
        length = headers.get(b"content-length", b"0")
        self._has_body = b"transfer-encoding" in headers or length.strip(b"0") != b""
        self._waits = b"expect" in headers  # its client may send the body once it is asked for
        self._lingers = False  # the connection is closed after the answer, before the body's end

    async def send(self, message: Message) -> None:
        """Pass a message of the answer on, with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message["headers"], *SAFE, (b"x-request-id", self.id.encode())]
            if self._has_body and not self.complete:
                if not self._waits:
                    await self._discard_body(0.0)  # it may have come with the head
                if not self.complete:
                    self._lingers = True
                    headers.append((b"connection", b"close"))
            message["headers"] = headers
        elif self._lingers and not message.get("more_body", False):
            # Closing with unread data resets the connection, and the client may lose the answer.
            await self._send({**message, "more_body": True})
            left = self.until - time.monotonic() - 2 * TICK
            await self._discard_body(max(0.0, min(LINGER_SECONDS, left)))
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _discard_body(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.complete:
                    self.complete = not (await self._receive()).get("more_body", False)

    async def receive(self) -> Message:
        """Receive a part of the body.

        Raises:
            HTTPException: the body is too large, or all bodies together are.
        """
        message = await self._receive()
        if self.complete:  # what comes now is the end of the connection, however late
            return message
        middleware, settings = self._middleware, self._settings
        received = len(message.get("body", b""))
        self.size += received
        middleware.held += received
        if not message.get("more_body", False):
            self.complete = True
            self.until = self.start + settings.request_seconds
        if self.size > settings.largest_body:
            middleware.refused.labels("body").inc()
            raise HTTPException(413, _too_large(settings))
        if middleware.held > settings.max_held_bytes:
            middleware.refused.labels("held").inc()
            full = "too much is being sent at once; try again in 1 s"
            raise HTTPException(429, full, {"retry-after": "1"})
        return message


class RequestMiddleware:
    """Wraps the application."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeSettings,
        token: str | None,
        registry: CollectorRegistry,
        paths: Mapping[Any, str],
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            settings: the limits.
            token: the bearer token that requests must carry, if any.
            registry: where metrics are registered.
            paths: the path template of each endpoint, for the metrics.
        """
        self._paths = paths
        self._app, self._settings, self._token = app, settings, token
        self._log = AccessLog(registry)
        self._under_way: set[_Request] = set()
        self.held = 0  # bytes of all their bodies
        self.refused = Counter(
            "reptile_refused_requests",
            "Requests refused, by reason.",
            ["reason"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, an ASGI application's way."""
        if scope["type"] != "http":
            ending = asyncio.create_task(self._end_late())
            try:
                await self._app(scope, receive, send)
            finally:
                ending.cancel()
            return
        headers = dict(scope["headers"])
        request = _Request(self, self._settings, headers, receive, send)
        refusal = _malformed(scope["headers"]) if len(headers) < len(scope["headers"]) else None
        if refusal := refusal or self._refusal(scope["path"], headers):
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
        self._log.add(
            Ended(
                request.id,
                scope["method"],
                scope["path"],
                self._paths.get(scope.get("endpoint"), "unknown"),
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
        guarded = not self._token and GUARDED.fullmatch(path)  # other sites do not know a token
        if guarded and (foreign := _foreign(headers, self._settings.hosts)):
            self.refused.labels("origin").inc()
            return JSONResponse({"error": foreign}, 403)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._settings.largest_body:
            self.refused.labels("body").inc()
            return JSONResponse({"error": _too_large(self._settings)}, 413)
        return _encoded(headers)

    def _late(self, request: _Request) -> JSONResponse:
        if request.complete:
            self.refused.labels("deadline").inc()
            late = f"no answer within {self._settings.request_seconds:g} s; try again"
            return JSONResponse({"error": late}, 503, {"retry-after": "1"})
        self.refused.labels("slow").inc()
        late = f"the body did not arrive within {self._settings.body_seconds:g} s"
        return JSONResponse({"error": late}, 408)


def _malformed(headers: Iterable[tuple[bytes, bytes]]) -> JSONResponse | None:
    names = [name for name, _ in headers]
    for name in ONCE:
        if names.count(name) > 1:
            return JSONResponse({"error": f"{name.decode()} is there twice: send it once"}, 400)
    return None


def _encoded(headers: Mapping[bytes, bytes]) -> JSONResponse | None:
    """Refuse a body that would be taken as it is though it is compressed."""
    coding = headers.get(b"content-encoding", b"").strip().lower()
    if coding not in (b"", b"identity"):
        text = f"content-encoding {coding.decode('latin-1')[:100]!r}: send the body uncompressed"
        return JSONResponse({"error": text}, 415, {"accept-encoding": "identity"})
    coding = headers.get(b"transfer-encoding", b"chunked").strip().lower()
    if coding != b"chunked":
        text = f"transfer-encoding {coding.decode('latin-1')[:100]!r}: send `chunked` alone"
        return JSONResponse({"error": text}, 400)
    return None


def _too_large(settings: ServeSettings) -> str:
    return f"the body is larger than {settings.largest_body} bytes"


def _foreign(headers: Mapping[bytes, bytes], hosts: tuple[str, ...]) -> str | None:
    """Return why a request may come from a web page of another site, or None.

    A page of another site can send forms and text to any address that its visitor's browser
    reaches; and by DNS rebinding it can give such an address a name of its own, and read.
    """
    host = headers.get(b"host", b"").decode("latin-1").lower()
    if host and not is_known(host, hosts):
        return (
            f"host {host[:100]!r} is not known: allow it with `-S hosts=NAME`, or set a token in "
            "REPTILE_TOKEN"
        )
    if headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
        return "requests from pages of other sites are refused; set a token in REPTILE_TOKEN"
    origin = headers.get(b"origin")
    if origin is None:
        return None
    source = origin.decode("latin-1").lower().partition("://")[2]
    if source and (source == host or _name(source) in hosts):
        return None
    return (
        f"requests from pages of {origin.decode('latin-1')[:100]!r} are refused: allow its host "
        "with `-S hosts=NAME`, or set a token in REPTILE_TOKEN"
    )


@lru_cache(maxsize=64)
def is_known(host: str, hosts: tuple[str, ...]) -> bool:
    """Return whether no other site can give the server's address this name."""
    name = _name(host)
    if name in hosts or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name(host: str) -> str:
    """Return a host without its port; nothing of what is no host."""
    match = HOST.fullmatch(host)
    return (match[1] or match[2]) if match else ""
