"""Runs the service as a process: the server below it, its log, and how it stops."""

import gc
import logging
import os
import signal
import sys
from pathlib import Path

import uvicorn

from reptile.errors import InputError
from reptile.runtime import FewShotModel, FewShotRegressor
from reptile.runtime.bundle import open_bundle
from reptile.serve.access_log import JsonLines
from reptile.serve.app import make_app
from reptile.serve.connection import Connection
from reptile.serve.settings import ServeSettings
from reptile.serve.task_store import Model

TOKEN = "REPTILE_TOKEN"


def run(bundle: Path, host: str, port: int, settings: ServeSettings) -> None:
    """Serve a bundle until SIGTERM or SIGINT; what has begun by then is finished.

    Raises:
        InputError: a bundle that cannot be opened, or a folder for tasks that cannot be used, or an
            empty token.
    """
    token = read_token()
    _log_as_json()
    # The thread that predicts waits so long for the interpreter after each run: by default 5 ms.
    sys.setswitchinterval(0.0005)
    # uvicorn raises what stopped it once more when all is answered; that end is no failure.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, frame: sys.exit(0))
    gc.set_threshold(20_000)  # with the default of 700 objects it takes a tenth of the time
    settings = settings.model_copy(update={"hosts": (*settings.hosts, host.lower())})
    app = make_app(load_model(bundle), settings, token)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=2 * settings.connections,  # the middleware answers before
        timeout_keep_alive=int(settings.body_seconds),
        timeout_graceful_shutdown=int(settings.request_seconds),
        http=Connection,
        ws="none",
    )


def load_model(bundle: Path) -> Model:
    """Open a bundle of either kind.

    Raises:
        InputError: it cannot be opened.
    """
    kind = FewShotRegressor if open_bundle(bundle).kind == "regression" else FewShotModel
    return kind.load(bundle, threads=1)


def read_token() -> str | None:
    """Return the token of the environment, if any, without the newline of a file it came from.

    Raises:
        InputError: it is empty, which would leave the server open.
    """
    token = os.environ.get(TOKEN)
    if token is None:
        return None
    if not token.strip():
        raise InputError(f"{TOKEN} is empty: give it a value, or unset it to serve without a token")
    return token.strip()


def _log_as_json() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
