"""The task API for people: adapt, change, list, delete, classify. Models' tensors are elsewhere."""

from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from reptile.errors import InputError
from reptile.serve.errors import first_error
from reptile.serve.request_body import (
    MAX_LABEL,
    in_thread_if_large,
    is_form,
    json_body,
    parse,
    read_files,
    unless_disconnected,
)
from reptile.serve.service import Service
from reptile.serve.task_store import AdaptedTask

Array = npt.NDArray[Any]
Label = Annotated[str, Field(max_length=MAX_LABEL)] | int | bool | float


class Options(BaseModel):
    """Options of an adaptation, as query parameters or in JSON."""

    steps: int | None = None
    learning_rate: float | None = None
    seed: int | None = None


class Examples(BaseModel):
    """Labelled images, as JSON."""

    model_config = ConfigDict(extra="forbid")

    images: list[Any]
    """[N, C, H, W], or [N, H, W] where C is 1; pixels 0..255."""
    labels: list[Label]
    """The label of each image."""


class Support(Examples, Options):
    """A support set, as JSON."""


Read = TypeVar("Read", bound=Examples)


class Images(BaseModel):
    """Images to classify, as JSON."""

    model_config = ConfigDict(extra="forbid")

    images: list[Any]


class Task(BaseModel):
    """An adapted task."""

    id: str
    labels: list[Label]
    losses: list[float]
    """The loss before each inner step."""
    taught: datetime
    """When it was adapted or last changed."""
    expires: datetime


def task_routes(service: Service) -> list[BaseRoute]:
    """Return the routes."""

    def shown(task: AdaptedTask) -> Task:
        return Task(
            id=task.id,
            labels=task.model.labels,
            losses=task.model.losses.tolist(),
            taught=datetime.fromtimestamp(task.created, UTC),
            expires=datetime.fromtimestamp(service.store.expires(task), UTC),
        )

    async def labelled(request: Request, kind: type[Read]) -> tuple[Array, list[Any], Read | None]:
        """Read images and their labels from a form or from JSON, which is returned too."""
        if is_form(request):
            files = await read_files(request, service)
            return np.stack([image for _, image in files]), [name for name, _ in files], None
        body = await json_body(request, service)

        def read() -> tuple[Array, Read]:
            examples = parse(kind, body)
            return service.images(examples.images), examples

        images, examples = await in_thread_if_large(len(body), read)
        return images, examples.labels, examples

    async def adapt(request: Request) -> Response:
        options = _options(request)
        images, labels, support = await labelled(request, Support)
        if support:
            in_body = support.model_dump(include=set(Options.model_fields), exclude_none=True)
            options = in_body | options
        task = await unless_disconnected(request, service.adapt(images, labels, **options))
        return _json(shown(task), 201, {"location": f"/tasks/{task.id}"})

    async def add(request: Request) -> Response:
        name = service.task(request.path_params["task_id"]).id
        images, labels, _ = await labelled(request, Examples)
        return _json(shown(await unless_disconnected(request, service.add(name, images, labels))))

    async def remove(request: Request) -> Response:
        name, label = request.path_params["task_id"], request.path_params["label"]
        return _json(shown(await service.remove(name, label)))

    async def list_all(request: Request) -> Response:
        return _json({"tasks": [shown(task) for task in service.store]})

    async def get(request: Request) -> Response:
        return _json(shown(service.task(request.path_params["task_id"])))

    async def delete(request: Request) -> Response:
        task = service.task(request.path_params["task_id"])
        service.store.remove(task.id)
        return Response(status_code=204)

    async def predict(request: Request) -> Response:
        task = service.task(request.path_params["task_id"])
        if is_form(request):
            files = await read_files(request, service)
            images = np.stack([image for _, image in files])
        else:
            body = await json_body(request, service)
            images = await in_thread_if_large(
                len(body), lambda: service.images(parse(Images, body).images)
            )
        outputs = await service.predictor.predict(task.model, images)
        labels = task.model.labels
        names = [str(label) for label in labels]
        predictions = [
            {"label": labels[best], "probabilities": dict(zip(names, row, strict=True))}
            for best, row in zip(
                outputs.logits.argmax(1).tolist(), outputs.probabilities.tolist(), strict=True
            )
        ]
        return _json({"predictions": predictions})

    return [
        Route("/tasks/{task_id}/predict", predict, methods=["POST"]),
        Route("/tasks/{task_id}/examples", add, methods=["POST"]),
        Route("/tasks/{task_id}/labels/{label:path}", remove, methods=["DELETE"]),
        Route("/tasks", adapt, methods=["POST"]),
        Route("/tasks", list_all),
        Route("/tasks/{task_id}", get),
        Route("/tasks/{task_id}", delete, methods=["DELETE"]),
    ]


def _options(request: Request) -> dict[str, Any]:
    """Return the adaptation's options among the query parameters."""
    try:
        options = Options.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise InputError(first_error(error)) from None
    return options.model_dump(exclude_none=True)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")
