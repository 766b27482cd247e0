"""The task API: teach, list, forget, and name images. For people; models' tensors are elsewhere."""

from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from reptile.serve.errors import responses
from reptile.serve.request_body import (
    MAX_LABEL,
    apart,
    described_body,
    is_form,
    json_body,
    parse,
    read_files,
    unless_gone,
)
from reptile.serve.service import Service
from reptile.serve.task_store import TaughtTask

Array = npt.NDArray[Any]
Label = Annotated[str, Field(max_length=MAX_LABEL)] | int | bool | float


class Support(BaseModel):
    """A task to teach, as JSON."""

    model_config = ConfigDict(extra="forbid")

    images: list[Any]
    """[N, C, H, W], or [N, H, W] where C is 1; pixels 0..255."""
    labels: list[Label]
    """A name for each image."""
    steps: int | None = None
    learning_rate: float | None = None
    seed: int = 0


class Queries(BaseModel):
    """Images to name, as JSON."""

    model_config = ConfigDict(extra="forbid")

    images: list[Any]


class Task(BaseModel):
    """A task that was taught."""

    id: str
    labels: list[Label]
    losses: list[float]
    """The loss before each inner step."""
    taught: datetime
    expires: datetime


class Tasks(BaseModel):
    """All tasks that are there."""

    tasks: list[Task]


class NamedImage(BaseModel):
    """What an image is taken for."""

    label: Label
    probabilities: dict[str, float]


class Predictions(BaseModel):
    """An answer for each image, in order."""

    predictions: list[NamedImage]


def task_routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/tasks", tags=["Tasks"])

    def shown(task: TaughtTask) -> Task:
        return Task(
            id=task.id,
            labels=task.model.labels,
            losses=task.model.losses.tolist(),
            taught=datetime.fromtimestamp(task.taught, UTC),
            expires=datetime.fromtimestamp(service.store.expires(task), UTC),
        )

    @router.post(
        "",
        status_code=201,
        responses=responses(400, 415, 422, 429),
        openapi_extra=described_body({"application/json": Support, "multipart/form-data": None}),
    )
    async def teach(
        request: Request,
        response: Response,
        steps: Annotated[int | None, Query()] = None,
        learning_rate: Annotated[float | None, Query()] = None,
        seed: Annotated[int | None, Query()] = None,
    ) -> Task:
        """Teach a task: image files whose field names are their labels, or JSON.

        As a form, options are query parameters.
        """
        given = {"steps": steps, "learning_rate": learning_rate, "seed": seed}
        if is_form(request):
            named = await read_files(request, service)
            images = np.stack([image for _, image in named])
            labels: list[Any] = [name for name, _ in named]
        else:
            body = await json_body(request, service)

            def read() -> tuple[Array, Support]:
                support = parse(Support, body)
                return service.images(support.images), support

            images, support = await apart(len(body), read)
            labels = support.labels
            given = {
                name: getattr(support, name) if value is None else value
                for name, value in given.items()
            }
        options = {name: value for name, value in given.items() if value is not None}
        task = await unless_gone(request, service.teach(images, labels, **options))
        response.headers["location"] = f"/tasks/{task.id}"
        return shown(task)

    @router.get("", responses=responses())
    async def list_all() -> Tasks:
        """All tasks that are there."""
        return Tasks(tasks=[shown(task) for task in service.store])

    @router.get("/{task_id}", responses=responses(404, 422))
    async def get(task_id: str) -> Task:
        """One task."""
        return shown(service.task(task_id))

    @router.delete("/{task_id}", status_code=204, responses=responses(404, 422))
    async def delete(task_id: str) -> None:
        """Forget a task."""
        service.task(task_id)
        service.store.remove(task_id)

    @router.post(
        "/{task_id}/predict",
        responses={200: {"model": Predictions}, **responses(400, 404, 415, 422, 429)},
        openapi_extra=described_body({"application/json": Queries, "multipart/form-data": None}),
    )
    async def predict(task_id: str, request: Request) -> Response:
        """Name images: files in fields of any name, or JSON."""
        task = service.task(task_id)
        if is_form(request):
            named = await read_files(request, service)
            images = np.stack([image for _, image in named])
        else:
            body = await json_body(request, service)
            images = await apart(len(body), lambda: service.images(parse(Queries, body).images))
        found = await service.predictor.predict(task.model, images)
        labels = task.model.labels
        names = [str(label) for label in labels]
        predictions = [
            {"label": labels[best], "probabilities": dict(zip(names, row, strict=True))}
            for best, row in zip(
                found.logits.argmax(1).tolist(), found.probabilities.tolist(), strict=True
            )
        ]
        return Response(to_json({"predictions": predictions}), media_type="application/json")

    return router
