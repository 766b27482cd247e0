"""The routes: the Open Inference Protocol, the tasks, health, metrics, the page and the document.

Turns requests into calls of `service` and its errors into answers; decides nothing else.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import from_json, to_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse
from starlette.routing import Match, Route, compile_path
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from reptile import __version__
from reptile.errors import DivergedError, InputError
from reptile.images import decode, fit
from reptile.runtime import FewShotModel
from reptile.serve.guard import Guard
from reptile.serve.protocol import (
    InferenceRequest,
    InferenceResponse,
    ModelMetadata,
    ServerMetadata,
    metadata,
    read_inputs,
    write_outputs,
)
from reptile.serve.service import Service, UnknownError
from reptile.serve.settings import ServeSettings
from reptile.serve.store import TaughtTask
from reptile.serve.workers import BusyError

Array = npt.NDArray[Any]
Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")
Label = Annotated[str, Field(max_length=200)] | int | bool | float
MAX_LABEL = 200  # characters
SCHEMAS = "#/components/schemas/{model}"
LARGE = 2**16  # bytes of a body that is parsed in a thread of its own

PAGE = Path(str(files("reptile.serve"))) / "page"
ORT = Path(str(files("reptile.serve"))) / "ort"
POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)


class Problem(BaseModel):
    """Why a request was refused."""

    error: str


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


def make_app(model: FewShotModel, settings: ServeSettings, token: str | None = None) -> ASGIApp:
    """Return the application that serves a bundle.

    Args:
        model: the bundle, opened with one thread a call.
        settings: the bounds.
        token: what every request but health must carry as a bearer token, if anything.
    """
    service, registry = Service(model, settings), CollectorRegistry()

    @asynccontextmanager
    async def live(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            service.close()

    app = FastAPIOffline(
        title="Few-shot learning",
        version=__version__,
        description=f"Teach {model.manifest['name']} new classes from a few images of each.",
        lifespan=live,
        redoc_url=None,
    )
    app.state.service = service
    if ORT.is_dir():
        app.mount("/ort", StaticFiles(directory=ORT))
    protocol, infer = _protocol(service)
    tasks, predict = _tasks(service)
    for router in (protocol, tasks, _files(model)):
        app.include_router(router)
    _handle_errors(app, registry)
    registry.register(_Measures(service))

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    _describe_bodies(app)
    app.mount("/page", StaticFiles(directory=PAGE, check_dir=False))
    ways = {"/v2/models/{model}/infer": infer, "/tasks/{task_id}/predict": predict}
    return Guard(_Shortcut(app, ways), settings, token, registry)


Endpoint = Callable[..., Awaitable[Response]]


class _Shortcut:
    """Answers some POSTs without FastAPI's work, which takes longer than a prediction.

    Its document describes them: it has the same endpoints.
    """

    def __init__(self, app: FastAPI, endpoints: Mapping[str, Endpoint]) -> None:
        self._app = app
        self._routes = [
            Route(path, self._plain(endpoint), methods=["POST"])
            for path, endpoint in endpoints.items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["method"] == "POST":
            for route in self._routes:
                match, found = route.matches(scope)
                if match is Match.FULL:
                    handlers = self._app.exception_handlers
                    scope.update(found)
                    scope["app"], scope["route"] = self._app, route
                    scope["starlette.exception_handlers"] = (handlers, {})
                    await route.handle(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    @staticmethod
    def _plain(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def plain(request: Request) -> Response:
            return await endpoint(request=request, **request.path_params)

        return plain


class _Measures:
    """What is read off the service when it is asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> list[GaugeMetricFamily]:
        service = self._service
        values = {
            "reptile_adaptations_pending": ("Running and waiting.", service.adapter.pending),
            "reptile_predictions_pending": (
                "Images, running and waiting.",
                service.predictor.images,
            ),
            "reptile_tasks": ("Taught tasks that are kept.", len(service.store)),
            "reptile_task_bytes": ("Taught tasks that are kept.", service.store.size),
            "reptile_ready": ("1 when requests are taken.", int(service.ready)),
        }
        return [GaugeMetricFamily(name, text, value) for name, (text, value) in values.items()]


# ---- Errors


def _handle_errors(app: FastAPI, registry: CollectorRegistry) -> None:
    diverged = Counter("reptile_not_finite", "Adaptations that diverged.", registry=registry)

    def answer(status: int, text: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers)

    async def bad_input(request: Request, error: InputError) -> Response:
        if isinstance(error, DivergedError):
            diverged.inc()
        return answer(422, str(error))

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(422, _told(error.errors()))

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
        return answer(500, "the server has a fault; its log says more")

    for kind, handler in (
        (InputError, bad_input),
        (RequestValidationError, invalid),
        (BusyError, busy),
        (TimeoutError, late),
        (HTTPException, http),
        (UnknownError, unknown),
        (Exception, failed),
    ):
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]


def _allowed(app: FastAPI, path: str) -> dict[str, str]:
    """Return the header with all methods of a path; Starlette knows those of one route only."""
    for template, methods in app.openapi()["paths"].items():
        if compile_path(template)[0].match(path):
            return {"allow": ", ".join(sorted(method.upper() for method in methods))}
    return {}


def _told(errors: Any) -> str:
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
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


# ---- The Open Inference Protocol


def _protocol(service: Service) -> tuple[APIRouter, Endpoint]:
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @router.get("", responses=_responses())
    async def server() -> ServerMetadata:
        """What serves."""
        return ServerMetadata(name="reptile", version=__version__)

    @router.get("/health/live", response_class=Response)
    async def live() -> Response:
        """200 as long as the process answers."""
        return Response()

    @router.get("/health/ready", response_class=Response, responses=_responses())
    async def ready() -> Response:
        """200 when requests are taken; 503 before and while stopping."""
        if not service.ready:
            raise HTTPException(503, "not ready: starting or stopping", {"retry-after": "1"})
        return Response()

    @router.get("/models/{model}", responses=_responses(404, 422))
    async def describe(model: str) -> ModelMetadata:
        """The inputs and outputs of `few_shot`, `predict`, or a taught task `task-ID`."""
        inputs, outputs = service.tensors(model)
        return ModelMetadata(name=model, inputs=metadata(inputs), outputs=metadata(outputs))

    @router.get("/models/{model}/ready", response_class=Response, responses=_responses(404, 422))
    async def model_ready(model: str) -> Response:
        """200 if there is such a model."""
        service.tensors(model)
        return Response()

    @router.post(
        "/models/{model}/infer",
        responses={200: {"model": InferenceResponse}, **_responses(400, 404, 422, 429)},
        openapi_extra=_body({"application/json": InferenceRequest}),
    )
    async def infer(model: str, request: Request) -> Response:
        """Run a model on tensors."""
        inputs, _ = service.tensors(model)
        body = await _json_body(request, service)
        asked, feeds = await _apart(len(body), lambda: _infer_request(body, inputs))
        found = await service.infer(model, feeds)
        return await _apart(
            sum(array.nbytes for array in found.values()),
            lambda: _json(write_outputs(asked, model, found)),
        )

    return router, infer


def _infer_request(body: bytes, inputs: Any) -> tuple[InferenceRequest, dict[str, Array]]:
    asked = _parse(InferenceRequest, body)
    return asked, read_inputs(asked, inputs)


# ---- Tasks


def _tasks(service: Service) -> tuple[APIRouter, Endpoint]:
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
        responses=_responses(400, 415, 422, 429),
        openapi_extra=_body({"application/json": Support, "multipart/form-data": None}),
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
        if _is_form(request):
            named = await _read_files(request, service)
            images = np.stack([image for _, image in named])
            labels: list[Any] = [name for name, _ in named]
        else:
            body = await _json_body(request, service)

            def read() -> tuple[Array, Support]:
                support = _parse(Support, body)
                return service.images(support.images), support

            images, support = await _apart(len(body), read)
            labels = support.labels
            given = {
                name: getattr(support, name) if value is None else value
                for name, value in given.items()
            }
        options = {name: value for name, value in given.items() if value is not None}
        task = await service.teach(images, labels, **options)
        response.headers["location"] = f"/tasks/{task.id}"
        return shown(task)

    @router.get("", responses=_responses())
    async def list_all() -> Tasks:
        """All tasks that are there."""
        return Tasks(tasks=[shown(task) for task in service.store])

    @router.get("/{task_id}", responses=_responses(404, 422))
    async def get(task_id: str) -> Task:
        """One task."""
        return shown(service.task(task_id))

    @router.delete("/{task_id}", status_code=204, responses=_responses(404, 422))
    async def delete(task_id: str) -> None:
        """Forget a task."""
        service.task(task_id)
        service.store.remove(task_id)

    @router.post(
        "/{task_id}/predict",
        responses={200: {"model": Predictions}, **_responses(400, 404, 415, 422, 429)},
        openapi_extra=_body({"application/json": Queries, "multipart/form-data": None}),
    )
    async def predict(task_id: str, request: Request) -> Response:
        """Name images: files in fields of any name, or JSON."""
        task = service.task(task_id)
        if _is_form(request):
            named = await _read_files(request, service)
            images = np.stack([image for _, image in named])
        else:
            body = await _json_body(request, service)
            images = await _apart(len(body), lambda: service.images(_parse(Queries, body).images))
        labels = task.model.labels
        probabilities = await service.predictor.predict(task.model, images)
        names = [str(label) for label in labels]
        predictions = [
            {"label": labels[best], "probabilities": dict(zip(names, row, strict=True))}
            for best, row in zip(
                probabilities.argmax(1).tolist(), probabilities.tolist(), strict=True
            )
        ]
        return Response(to_json({"predictions": predictions}), media_type="application/json")

    return router, predict


def _is_form(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return True
    if kind not in ("application/json", ""):
        raise HTTPException(
            415, f"content-type {kind[:100]!r}: send application/json or multipart/form-data"
        )
    return False


async def _read_files(request: Request, service: Service) -> list[tuple[str, Array]]:
    """Return the form's image files as (field name, pixels [C, H, W])."""
    settings = service.settings
    async with request.form(max_files=settings.max_images, max_fields=16) as form:
        contents: list[tuple[str, str, bytes]] = []
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise InputError(
                    f"field {name[:100]!r} is text: send image files, as -F NAME=@FILE"
                )
            if len(name) > MAX_LABEL:
                raise InputError(f"a field's name has {len(name)} characters: at most {MAX_LABEL}")
            contents.append((name, value.filename or name, await value.read()))
    if not contents:
        raise InputError("no images: send one or more files, as -F NAME=@FILE")

    def decoded() -> list[tuple[str, Array]]:
        found, left = [], settings.max_request_pixels
        until = time.monotonic() + settings.request_seconds
        for name, file, content in contents:
            if time.monotonic() > until:
                raise TimeoutError(
                    f"the images were not read within {settings.request_seconds:g} s"
                )
            image = decode(file[:200], content, min(left, settings.max_image_pixels))
            left -= image.width * image.height
            found.append((name, fit(image, service.model.image_shape).astype(np.float32)))
        return found

    return await to_thread.run_sync(decoded, limiter=_few())


# ---- The page and the bundle's files


def _files(model: FewShotModel) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"content-security-policy": POLICY})

    allowed = {"manifest.json", *model.manifest["files"]}

    @router.get("/bundle/{path:path}")
    async def bundle_file(path: str) -> Response:
        if path not in allowed:
            raise HTTPException(404, f"{path[:100]!r} is no file of the bundle")
        return FileResponse(model.bundle.folder / path, headers={"cache-control": "no-cache"})

    @router.get("/ort/{path:path}")
    async def no_runtime(path: str) -> Response:
        raise HTTPException(404, "onnxruntime-web is not installed here: `make page` installs it")

    return router


# ---- JSON


def _body(kinds: dict[str, type[BaseModel] | None]) -> dict[str, Any]:
    """Describe a body that is read by hand, so that nothing is parsed before it is bounded."""
    files = {
        "type": "object",
        "additionalProperties": {"type": "string", "format": "binary"},
        "minProperties": 1,
    }
    content = {
        kind: {"schema": {"$ref": SCHEMAS.format(model=model.__name__)} if model else files}
        for kind, model in kinds.items()
    }
    return {"requestBody": {"required": True, "content": content}}


def _describe_bodies(app: FastAPI) -> None:
    """Add to the document what bodies look like that are read by hand."""
    written = app.openapi()
    read = [(kind, "validation") for kind in (InferenceRequest, Queries, Support)]
    _, definitions = models_json_schema(read, ref_template=SCHEMAS)  # type: ignore[arg-type]
    written["components"]["schemas"].update(definitions["$defs"])


async def _json_body(request: Request, service: Service) -> bytes:
    size, most = 0, service.settings.max_json_bytes
    parts = []
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(
                413, f"JSON of more than {most} bytes: send image files as a form, or fewer images"
            )
        parts.append(part)
    return b"".join(parts)


def _parse(kind: type[Model], body: bytes) -> Model:
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is no JSON: {str(error)[:200]}") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(_told(error.errors(include_url=False, include_input=False))) from None


async def _apart(size: int, work: Callable[[], Result]) -> Result:
    """Run what takes long for large bodies in a thread, so that others are answered meanwhile."""
    return await to_thread.run_sync(work, limiter=_few()) if size > LARGE else work()


_LIMITER: RunVar[CapacityLimiter] = RunVar("large bodies")


def _few() -> CapacityLimiter:
    """Return what lets two large bodies be read at a time: they grow, and take the processor."""
    try:
        return _LIMITER.get()
    except LookupError:
        _LIMITER.set(CapacityLimiter(2))
        return _LIMITER.get()


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")
