"""How the server refuses: its errors as answers, and how the document tells of them."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from reptile.errors import DivergedError, InputError
from reptile.serve.service import UnknownError
from reptile.serve.workers import BusyError

log = logging.getLogger(__name__)

FAULT = "the server has a fault; its log says more"


class Problem(BaseModel):
    """Why a request was refused."""

    error: str


def handle_errors(app: FastAPI, registry: CollectorRegistry) -> None:
    """Answer every error with its status and one sentence."""
    diverged = Counter("reptile_not_finite", "Adaptations that diverged.", registry=registry)

    def answer(status: int, text: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers)

    async def bad_input(request: Request, error: InputError) -> Response:
        if isinstance(error.__cause__, OSError):  # the server's own disk, whose paths stay here
            log.error("%s", error)
            return answer(507, "the server cannot store this now; its log says why")
        return answer(422, str(error))

    async def not_finite(request: Request, error: DivergedError) -> Response:
        diverged.inc()
        return answer(422, str(error))

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(422, told(error.errors()))

    async def busy(request: Request, error: BusyError) -> Response:
        return answer(429, str(error), **{"retry-after": str(error.seconds)})

    async def late(request: Request, error: TimeoutError) -> Response:
        return answer(503, f"{error}; ask for fewer steps", **{"retry-after": "1"})

    async def http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers |= _allowed(app, request.url.path)
        return answer(error.status_code, error.detail, **headers)

    async def unknown(request: Request, error: UnknownError) -> Response:
        return answer(404, str(error))

    async def failed(request: Request, error: Exception) -> Response:
        return answer(500, FAULT)

    handlers: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {
        InputError: bad_input,
        DivergedError: not_finite,
        RequestValidationError: invalid,
        BusyError: busy,
        TimeoutError: late,
        HTTPException: http,
        UnknownError: unknown,
        Exception: failed,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _allowed(app: FastAPI, path: str) -> dict[str, str]:
    """Return the header with all methods of a path; Starlette knows those of one route only."""
    for template, methods in app.openapi()["paths"].items():
        if compile_path(template)[0].match(path):
            return {"allow": ", ".join(sorted(method.upper() for method in methods))}
    return {}


def told(errors: Any) -> str:
    """Say the first of pydantic's errors."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe refusals for the document."""
    reasons = {
        400: "The body is not what it says it is.",
        401: "The token is missing or wrong.",
        404: "There is no such task or model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        415: "The body is of a type that is not understood.",
        422: "A value that cannot be used.",
        429: "Too much is waiting; try again after Retry-After seconds.",
        503: "Not done in time, or not ready yet.",
    }
    always = (401, 408, 413, 503)
    return {
        status: {"model": Problem, "description": reasons[status]}
        for status in sorted({*always, *statuses})
    }
