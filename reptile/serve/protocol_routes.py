"""The routes of the Open Inference Protocol, version 2; its tensors are in `protocol`."""

import asyncio
import logging
from functools import lru_cache
from typing import Any

import numpy.typing as npt
from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from reptile import __version__
from reptile.serve.protocol import (
    EXTENSIONS,
    InferenceRequest,
    ModelMetadata,
    ServerMetadata,
    metadata,
    read_inputs,
    write_outputs,
)
from reptile.serve.request_body import (
    in_thread_if_large,
    json_body,
    parse,
    unless_disconnected,
    whole_body,
)
from reptile.serve.service import Service, UnknownError
from reptile.serve.task_store import StorageError

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

SMALL = 2**10  # bytes of JSON whose parsed form may be cached
MODEL = "/v2/models/{model}"
VERSION = MODEL + "/versions/{version}"
LENGTH = "inference-header-content-length"


def protocol_routes(service: Service) -> list[BaseRoute]:
    """Return the routes."""
    looking = asyncio.Lock()  # at the disk, by one thread for all who ask

    async def server(request: Request) -> Response:
        answer = ServerMetadata(name="reptile", version=__version__, extensions=list(EXTENSIONS))
        return JSONResponse(answer.model_dump())

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        if not service.ready:
            raise HTTPException(503, "not ready: starting or stopping", {"retry-after": "1"})
        try:
            async with looking:
                await to_thread.run_sync(service.store.check_writable)
        except StorageError as error:
            log.error("%s", error)
            full = "not ready: tasks cannot be stored; the server's log says why"
            raise HTTPException(503, full, {"retry-after": "1"}) from None
        return JSONResponse({"ready": True})

    async def model_metadata(request: Request) -> Response:
        model = _model(request)
        inputs, outputs = service.tensors(model)
        answer = ModelMetadata(name=model, inputs=metadata(inputs), outputs=metadata(outputs))
        return JSONResponse(answer.model_dump())

    async def model_ready(request: Request) -> Response:
        model = _model(request)
        service.tensors(model)
        return JSONResponse({"name": model, "ready": True})

    async def infer(request: Request) -> Response:
        model = _model(request)
        inputs, _ = service.tensors(model)
        body, size = await _json_and_binary(request, service)

        def read() -> tuple[InferenceRequest, dict[str, Array]]:
            wanted = _parsed(body[:size]) if size <= SMALL else parse(InferenceRequest, body[:size])
            return wanted, read_inputs(wanted, inputs, memoryview(body)[size:])

        wanted, feeds = await in_thread_if_large(len(body), read)
        if model in service.graphs:
            outputs = await unless_disconnected(request, service.run_graph(model, feeds))
        else:
            outputs = await service.predict_named(model, feeds["images"])
        return await in_thread_if_large(
            sum(array.nbytes for array in outputs.values()),
            lambda: _answer(*write_outputs(wanted, model, outputs)),
        )

    return [
        Route(f"{MODEL}/infer", infer, methods=["POST"]),
        Route("/v2", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route(MODEL, model_metadata),
        Route(f"{MODEL}/ready", model_ready),
        Route(f"{VERSION}/infer", infer, methods=["POST"]),
        Route(VERSION, model_metadata),
        Route(f"{VERSION}/ready", model_ready),
    ]


def _model(request: Request) -> str:
    """Return the name of the model that is asked for.

    Raises:
        UnknownError: in another version than the one there is.
    """
    model, version = request.path_params["model"], request.path_params.get("version", "1")
    if version != "1":
        raise UnknownError(f"model {model[:50]!r} has no version {version[:50]!r}: there is 1")
    return str(model)


@lru_cache(maxsize=64)
def _parsed(json: bytes) -> InferenceRequest:
    """Read JSON that stays the same from image to image, as it does before binary tensors."""
    return parse(InferenceRequest, json)


async def _json_and_binary(request: Request, service: Service) -> tuple[bytes, int]:
    """Return the body, and how many of its bytes are JSON."""
    given = request.headers.get(LENGTH)
    if given is None:
        body = await json_body(request, service)
        return body, len(body)
    body, most = await whole_body(request), service.settings.max_json_bytes
    size = int(given) if given.isascii() and given.isdecimal() and len(given) < 20 else -1
    if not 0 <= size <= min(len(body), most):
        raise HTTPException(
            400,
            f"{LENGTH} {given[:50]!r}: give the bytes of the JSON, at most {most} "
            f"of the body's {len(body)}",
        )
    return body, size


def _answer(json: bytes, binary: bytes) -> Response:
    if not binary:
        return Response(json, media_type="application/json")
    headers = {LENGTH: str(len(json))}
    return Response(json + binary, headers=headers, media_type="application/octet-stream")
