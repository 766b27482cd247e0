"""The application: the routes put together, the page, the metrics and the document.

Turns requests into calls of `service` and its errors into answers; decides nothing else.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from inspect import isawaitable
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from reptile import __version__
from reptile.runtime import FewShotModel
from reptile.serve.errors import handle_errors
from reptile.serve.middleware import Guard
from reptile.serve.protocol import InferenceRequest
from reptile.serve.protocol_routes import protocol_routes
from reptile.serve.request_body import SCHEMAS
from reptile.serve.service import Service
from reptile.serve.settings import ServeSettings
from reptile.serve.task_routes import Queries, Support, task_routes

PAGE = Path(str(files("reptile.serve"))) / "page"
ORT = Path(str(files("reptile.serve"))) / "ort"
PREDICTIONS = ("/v2/models/{model}/infer", "/tasks/{task_id}/predict")
POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)


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
    routers = (protocol_routes(service), task_routes(service), _files(model))
    for router in routers:
        app.include_router(router)
    handle_errors(app, registry)
    registry.register(_Measures(service))

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    _describe_bodies(app)
    app.mount("/page", StaticFiles(directory=PAGE, check_dir=False))
    return Guard(_Shortcut(app, routers), settings, token, registry)


class _Shortcut:
    """Answers predictions without FastAPI's work, which takes longer than a prediction."""

    def __init__(self, app: FastAPI, routers: Sequence[APIRouter]) -> None:
        self._app = app
        self._routes = [
            route
            for router in routers
            for route in router.routes
            if isinstance(route, APIRoute) and route.path in PREDICTIONS
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["method"] == "POST":
            for route in self._routes:
                if found := route.path_regex.match(scope["path"]):
                    scope["app"], scope["route"] = self._app, route
                    request = Request(scope, receive)
                    try:
                        response = await route.endpoint(request=request, **found.groupdict())
                    except Exception as error:
                        response = await self._refuse(request, error)
                    await response(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        for kind in type(error).__mro__:
            if kind is Exception:
                break  # a fault, which the guard logs and answers
            if handler := self._app.exception_handlers.get(kind):
                answered = handler(request, error)
                return await answered if isawaitable(answered) else answered
        raise error


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


def _describe_bodies(app: FastAPI) -> None:
    """Add to the document what bodies look like that are read by hand."""
    written = app.openapi()
    read: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (kind, "validation") for kind in (InferenceRequest, Queries, Support)
    ]
    _, definitions = models_json_schema(read, ref_template=SCHEMAS)
    written["components"]["schemas"].update(definitions["$defs"])
