"""The application: all routes, the page, the metrics and the OpenAPI document."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from reptile import __version__
from reptile.serve.errors import exception_handlers
from reptile.serve.middleware import RequestMiddleware
from reptile.serve.protocol_routes import MODEL, VERSION, protocol_routes
from reptile.serve.service import Service
from reptile.serve.settings import ServeSettings
from reptile.serve.task_routes import task_routes
from reptile.serve.task_store import Model

HERE = Path(str(files("reptile.serve")))
PAGE, ORT, DOCS = HERE / "page", HERE / "ort", HERE / "docs.html"
OPENAPI = HERE / "openapi.yaml"
VERSION_PARAMETER = {"name": "version", "in": "path", "required": True, "schema": {"const": "1"}}
POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)


def make_app(model: Model, settings: ServeSettings, token: str | None = None) -> ASGIApp:
    """Return the application that serves a bundle.

    Args:
        model: the bundle, opened with one thread a call.
        settings: the limits.
        token: the bearer token that every request but health must carry, if any.
    """
    service, registry = Service(model, settings), CollectorRegistry()
    registry.register(_ServiceMetrics(service))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            service.close()

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    # Routes are tried in this order, so the predictions come first.
    routes = [
        *task_routes(service),
        *protocol_routes(service),
        Route("/metrics", metrics),
        *_document(),
        *_files(model),
    ]
    app = Starlette(
        routes=routes, lifespan=lifespan, exception_handlers=exception_handlers(routes, registry)
    )
    # A redirect would name the scheme and host that a proxy hides: `/tasks/` is unknown instead.
    app.router.redirect_slashes = False
    # The first path of each endpoint names it in the metrics.
    paths = {each.endpoint: each.path for each in reversed(routes) if isinstance(each, Route)}
    return RequestMiddleware(app, settings, token, registry, paths)


class _ServiceMetrics:
    """Metrics that are read from the service when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> list[GaugeMetricFamily]:
        service = self._service
        values = {
            "reptile_adaptations_pending": (
                "Adaptations running and waiting.",
                service.adapter.pending,
            ),
            "reptile_predictions_pending": (
                "Images whose prediction is running or waiting.",
                service.predictor.images,
            ),
            "reptile_tasks": ("Adapted tasks that are kept.", len(service.store)),
            "reptile_task_bytes": ("Bytes of the adapted tasks.", service.store.size),
            "reptile_ready": ("1 when requests are accepted.", int(service.ready)),
        }
        return [GaugeMetricFamily(name, text, value) for name, (text, value) in values.items()]


def openapi() -> dict[str, Any]:
    """Return the OpenAPI document of this version."""
    document: dict[str, Any] = yaml.safe_load(OPENAPI.read_text(encoding="utf-8"))
    document["info"]["version"] = __version__
    paths = document["paths"]
    for path in [each for each in paths if each.startswith(MODEL)]:
        item = deepcopy(paths[path])
        for operation in item.values():
            operation["operationId"] += "OfVersion"
            operation["parameters"].append(VERSION_PARAMETER)
        paths[path.replace(MODEL, VERSION)] = item
    return document


def _document() -> list[BaseRoute]:
    answer = JSONResponse(openapi())

    async def document(request: Request) -> Response:
        return answer

    async def docs(request: Request) -> Response:
        return FileResponse(DOCS)

    return [Route("/openapi.json", document), Route("/docs", docs)]


def _files(model: Model) -> list[BaseRoute]:
    allowed = {"manifest.json", *model.manifest["files"]}
    bundle = StaticFiles(directory=model.bundle.folder)

    async def page(request: Request) -> Response:
        file = PAGE / ("index.html" if model.bundle.pixels else "rows.html")
        return FileResponse(file, headers={"content-security-policy": POLICY})

    async def bundle_file(request: Request) -> Response:
        path = request.path_params["path"]
        if path not in allowed:
            raise HTTPException(404, f"{path[:100]!r} is not a file of the bundle")
        try:
            answer = await bundle.get_response(path, request.scope)
        except HTTPException:
            raise FileNotFoundError(f"{path} of the bundle is no longer there") from None
        answer.headers["cache-control"] = "no-cache"
        return answer

    async def no_runtime(request: Request) -> Response:
        raise HTTPException(404, "onnxruntime-web is not installed here: `make page` installs it")

    return [
        Route("/", page),
        Route("/bundle/{path:path}", bundle_file),
        Mount("/ort", StaticFiles(directory=ORT))
        if ORT.is_dir()
        else Route("/ort/{path:path}", no_runtime),
        Mount("/page", StaticFiles(directory=PAGE, check_dir=False)),
    ]
