"""Errors as HTTP answers: a status and one sentence."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from reptile.errors import DivergedError, InputError
from reptile.serve.service import ConflictError, UnknownError
from reptile.serve.task_store import StorageError
from reptile.serve.workers import BusyError

log = logging.getLogger(__name__)

FAULT = "the server has a fault; its log says more"
LACKING = "the server lacks memory or a file for this; its log says more"

Handler = Callable[[Request, Any], Awaitable[Response]]


def exception_handlers(
    routes: Sequence[BaseRoute], registry: CollectorRegistry
) -> dict[Any, Handler]:
    """Return what answers each error that may be raised while a request is handled."""
    diverged = Counter("reptile_not_finite", "Adaptations that diverged.", registry=registry)

    def answer(status: int, text: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers)

    async def bad_input(request: Request, error: InputError) -> Response:
        return answer(422, str(error))

    async def storage(request: Request, error: StorageError) -> Response:
        log.error("%s", error)  # with the path, which clients should not see
        return answer(507, "the server cannot store or remove the task; its log says why")

    async def lacking(request: Request, error: OSError | MemoryError) -> Response:
        log.exception("lacking", exc_info=error)
        return answer(503, LACKING, **{"retry-after": "1"})

    async def not_finite(request: Request, error: DivergedError) -> Response:
        diverged.inc()
        return answer(422, str(error))

    async def busy(request: Request, error: BusyError) -> Response:
        return answer(429, str(error), **{"retry-after": str(error.seconds)})

    async def late(request: Request, error: TimeoutError) -> Response:
        return answer(
            503, f"{error}; ask for fewer steps or give fewer images", **{"retry-after": "1"}
        )

    async def http(request: Request, error: HTTPException) -> Response:
        headers, text, path = dict(error.headers or {}), error.detail, request.url.path
        if error.status_code == 405:
            headers["Allow"] = _allowed(routes, path) or "GET, HEAD"  # of files
            text = f"{request.method} is not a method of this path: it has {headers['Allow']}"
        elif text == "Not Found":  # the router's
            text = f"no such path {path[:100]!r}: /docs lists those there are"
        return answer(error.status_code, text, **headers)

    async def unknown(request: Request, error: UnknownError) -> Response:
        return answer(404, str(error))

    async def conflict(request: Request, error: ConflictError) -> Response:
        return answer(409, str(error))

    async def failed(request: Request, error: Exception) -> Response:
        return answer(500, FAULT)

    return {
        InputError: bad_input,
        StorageError: storage,
        DivergedError: not_finite,
        BusyError: busy,
        TimeoutError: late,
        OSError: lacking,
        MemoryError: lacking,
        HTTPException: http,
        UnknownError: unknown,
        ConflictError: conflict,
        Exception: failed,
    }


def _allowed(routes: Sequence[BaseRoute], path: str) -> str:
    """Return all methods of a path; Starlette gives those of its first route only."""
    methods: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.path_regex.match(path):
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


def first_error(error: ValidationError) -> str:
    """Return the first of pydantic's errors as one sentence."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])
