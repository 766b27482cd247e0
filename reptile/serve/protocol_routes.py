"""The routes of the Open Inference Protocol, version 2; its tensors are in `protocol`."""

from collections.abc import Awaitable, Callable
from typing import Any

import numpy.typing as npt
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from reptile import __version__
from reptile.serve.bodies import apart, described_body, json_body, parse
from reptile.serve.protocol import (
    InferenceRequest,
    InferenceResponse,
    ModelMetadata,
    ServerMetadata,
    metadata,
    read_inputs,
    write_outputs,
)
from reptile.serve.refusals import responses
from reptile.serve.service import Service

Array = npt.NDArray[Any]


def protocol_routes(service: Service) -> tuple[APIRouter, Callable[..., Awaitable[Response]]]:
    """Return the routes, and the endpoint of `infer`."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @router.get("", responses=responses())
    async def server() -> ServerMetadata:
        """What serves."""
        return ServerMetadata(name="reptile", version=__version__)

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
        responses={200: {"model": InferenceResponse}, **responses(400, 404, 422, 429)},
        openapi_extra=described_body({"application/json": InferenceRequest}),
    )
    async def infer(model: str, request: Request) -> Response:
        """Run a model on tensors."""
        inputs, _ = service.tensors(model)
        body = await json_body(request, service)
        asked, feeds = await apart(len(body), lambda: _infer_request(body, inputs))
        found = await service.infer(model, feeds)
        return await apart(
            sum(array.nbytes for array in found.values()),
            lambda: _json(write_outputs(asked, model, found)),
        )

    return router, infer


def _infer_request(body: bytes, inputs: Any) -> tuple[InferenceRequest, dict[str, Array]]:
    asked = parse(InferenceRequest, body)
    return asked, read_inputs(asked, inputs)


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")
