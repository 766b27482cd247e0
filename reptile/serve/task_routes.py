"""The task API for people: adapt, change, list, delete, predict. Models' tensors are elsewhere."""

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from reptile.errors import InputError
from reptile.serve.errors import first_error
from reptile.serve.examples import (
    Examples,
    Level,
    Options,
    Support,
    read_examples,
    read_queries,
)
from reptile.serve.request_body import unless_disconnected
from reptile.serve.service import Service
from reptile.serve.task_store import AdaptedTask, label_text
from reptile.serve.workers import Values


class Task(BaseModel):
    """An adapted task."""

    id: str
    labels: list[str | int | bool | float]
    """None of a regressor."""
    losses: list[float]
    """The loss before each inner step."""
    taught: datetime
    """When it was adapted or last changed."""
    expires: datetime


def task_routes(service: Service) -> list[BaseRoute]:
    """Return the routes."""
    names = [column.name for column in service.targets]

    def shown(task: AdaptedTask) -> Task:
        return Task(
            id=task.id,
            labels=task.labels,
            losses=task.model.losses.tolist(),
            taught=datetime.fromtimestamp(task.created, UTC),
            expires=datetime.fromtimestamp(service.store.expires(task), UTC),
        )

    async def adapt(request: Request) -> Response:
        options = _query(request, Options)
        examples = await read_examples(request, service, Support)
        work = service.adapt(examples.inputs, examples.targets, **(examples.options | options))
        task = await unless_disconnected(request, work)
        return _json(shown(task), 201, {"location": f"tasks/{task.id}"})

    async def add(request: Request) -> Response:
        name = service.task(request.path_params["task_id"]).id
        examples = await read_examples(request, service, Examples)
        work = service.add(name, examples.inputs, examples.targets)
        return _json(shown(await unless_disconnected(request, work)))

    async def remove(request: Request) -> Response:
        name, label = request.path_params["task_id"], request.path_params["label"]
        return _json(shown(await service.remove(name, label)))

    async def list_all(request: Request) -> Response:
        return _json({"tasks": [shown(task) for task in service.store]})

    async def get(request: Request) -> Response:
        return _json(shown(service.task(request.path_params["task_id"])))

    async def delete(request: Request) -> Response:
        task = service.task(request.path_params["task_id"])
        service.store.delete(task.id)
        return Response(status_code=204)

    async def predict(request: Request) -> Response:
        task = service.task(request.path_params["task_id"])
        level = _query(request, Level).get("level")
        queries = await read_queries(request, service)
        outputs = await service.predict(
            task.model, queries.inputs, queries.level if level is None else level
        )
        if isinstance(outputs, Values):
            return _json({"predictions": _by_name(outputs, names)})
        labels = task.labels
        texts = [label_text(label) for label in labels]
        predictions = [
            {"label": labels[best], "probabilities": dict(zip(texts, row, strict=True))}
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


def _by_name(outputs: Values, names: list[str]) -> list[dict[str, dict[str, float]]]:
    """Return the values of each input, and its intervals if there are any."""
    found = {key: array.tolist() for key, array in outputs._asdict().items() if array is not None}
    return [
        {key: dict(zip(names, row, strict=True)) for key, row in zip(found, rows, strict=True)}
        for rows in zip(*found.values(), strict=True)
    ]


def _query(request: Request, kind: type[BaseModel]) -> dict[str, Any]:
    """Return those of the query parameters that are fields of a model."""
    try:
        values = kind.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise InputError(first_error(error)) from None
    return values.model_dump(exclude_none=True)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")
