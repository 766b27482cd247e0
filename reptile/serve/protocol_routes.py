"""The routes of the Open Inference Protocol, version 2; its tensors are in `protocol`."""

from functools import lru_cache
from typing import Any

import numpy.typing as npt
from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from reptile import __version__
from reptile.serve.errors import responses
from reptile.serve.protocol import (
    EXTENSIONS,
    InferenceRequest,
    InferenceResponse,
    ModelMetadata,
    ServerMetadata,
    metadata,
    read_inputs,
    write_outputs,
)
from reptile.serve.request_body import (
    apart,
    described_body,
    json_body,
    parse,
    unless_gone,
    whole_body,
)
from reptile.serve.service import GRAPHS, Service

Array = npt.NDArray[Any]

SMALL = 2**10  # bytes of JSON that may be kept
LENGTH = "inference-header-content-length"
_LENGTH = {
    "description": "Bytes of the body that are JSON; the rest are binary tensors.",
    "schema": {"type": "integer", "minimum": 0},
}
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_BODY = described_body({"application/json": InferenceRequest})
_BODY["requestBody"]["content"].update(_BINARY)


def protocol_routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @router.get("", responses=responses())
    async def server() -> ServerMetadata:
        """What serves."""
        return ServerMetadata(name="reptile", version=__version__, extensions=list(EXTENSIONS))

    @router.get("/health/live", response_class=Response)
    async def live() -> Response:
        """200 as long as the process answers."""
        return Response()

    @router.get("/health/ready", response_class=Response, responses=responses())
    async def ready() -> Response:
        """200 when requests are taken; 503 before and while stopping."""
        if not service.ready:
            raise HTTPException(503, "not ready: starting or stopping", {"retry-after": "1"})
        return Response()

    @router.get("/models/{model}", responses=responses(404, 422))
    async def describe(model: str) -> ModelMetadata:
        """The inputs and outputs of `few_shot`, `predict`, or a taught task `task-ID`."""
        inputs, outputs = service.tensors(model)
        return ModelMetadata(name=model, inputs=metadata(inputs), outputs=metadata(outputs))

    @router.get("/models/{model}/ready", response_class=Response, responses=responses(404, 422))
    async def model_ready(model: str) -> Response:
        """200 if there is such a model."""
        service.tensors(model)
        return Response()

    @router.post(
        "/models/{model}/infer",
        responses={
            200: {"model": InferenceResponse, "content": _BINARY, "headers": {LENGTH: _LENGTH}},
            **responses(400, 404, 422, 429),
        },
        openapi_extra={
            **_BODY,
            "parameters": [{"name": LENGTH, "in": "header", **_LENGTH}],
        },
    )
    async def infer(model: str, request: Request) -> Response:
        """Run a model on tensors, as JSON or after it."""
        inputs, _ = service.tensors(model)
        body, size = await _json_and_binary(request, service)

        def read() -> tuple[InferenceRequest, dict[str, Array]]:
            asked = _parsed(body[:size]) if size <= SMALL else parse(InferenceRequest, body[:size])
            return asked, read_inputs(asked, inputs, memoryview(body)[size:])

        asked, feeds = await apart(len(body), read)
        if model in GRAPHS:
            found = await unless_gone(request, service.run_graph(model, feeds))
        else:
            found = await service.predict(model, feeds["images"])
        return await apart(
            sum(array.nbytes for array in found.values()),
            lambda: _answer(*write_outputs(asked, model, found)),
        )

    return router


@lru_cache(maxsize=64)
def _parsed(json: bytes) -> InferenceRequest:
    """Read JSON that stays the same from image to image, as it does before binary tensors."""
    return parse(InferenceRequest, json)


async def _json_and_binary(request: Request, service: Service) -> tuple[bytes, int]:
    """Return the body, and how many of its bytes are JSON."""
    told = request.headers.get(LENGTH)
    if told is None:
        body = await json_body(request, service)
        return body, len(body)
    body, most = await whole_body(request), service.settings.max_json_bytes
    size = int(told) if told.isascii() and told.isdecimal() and len(told) < 20 else -1
    if not 0 <= size <= min(len(body), most):
        raise HTTPException(
            400,
            f"{LENGTH} {told[:50]!r}: give the bytes of the JSON, at most {most} "
            f"of the body's {len(body)}",
        )
    return body, size


def _answer(json: bytes, binary: bytes) -> Response:
    if not binary:
        return Response(json, media_type="application/json")
    headers = {LENGTH: str(len(json))}
    return Response(json + binary, headers=headers, media_type="application/octet-stream")
