"""Runs the service as a process: the server below it, its log, and how it stops."""

import errno
import gc
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import uvicorn

from reptile.errors import InputError
from reptile.runtime import FewShotModel, FewShotRegressor
from reptile.runtime.bundle import open_bundle
from reptile.serve.access_log import JsonLines
from reptile.serve.app import make_app
from reptile.serve.connection import Connection
from reptile.serve.middleware import is_known
from reptile.serve.settings import ServeSettings
from reptile.serve.task_store import Model

log = logging.getLogger(__name__)

TOKEN = "REPTILE_TOKEN"
MAX_TOKEN = 4096  # characters: clients and proxies limit a header to some 8,000


def run(bundle: Path, host: str, port: int, settings: ServeSettings) -> None:
    """Serve a bundle until SIGTERM or SIGINT; what has begun by then is finished.

    Raises:
        InputError: a bundle that cannot be opened, a folder for tasks, an address or a token that
            cannot be used.
    """
    token = read_token()
    _log_as_json()
    # The thread that predicts waits so long for the interpreter after each run: by default 5 ms.
    sys.setswitchinterval(0.0005)
    # uvicorn raises what stopped it once more when all is answered; that end is no failure.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, frame: sys.exit(0))
    gc.set_threshold(20_000)  # with the default of 700 objects it takes a tenth of the time
    if not is_known(host.lower(), settings.hosts):
        settings = settings.model_copy(update={"hosts": (*settings.hosts, host.lower())})
    with ExitStack() as stack:
        sockets = [stack.enter_context(each) for each in bind(host, port)]
        if not token and not all(_is_local(each) for each in sockets):
            log.warning("%s is not set: whoever reaches %s can change tasks", TOKEN, host)
        config = uvicorn.Config(
            make_app(load_model(bundle), settings, token),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=2 * settings.connections,  # the middleware answers before
            timeout_keep_alive=int(settings.body_seconds),
            timeout_graceful_shutdown=math.ceil(settings.request_seconds),
            http=Connection,
            ws="none",
        )
        server = uvicorn.Server(config)
        server.run(sockets)
        if not server.started:
            sys.exit(1)


def bind(host: str, port: int) -> list[socket.socket]:
    """Return a socket for each address of a host.

    Raises:
        InputError: no such host, an address of another machine, or a port in use.
    """
    if not host:
        raise InputError("--host is empty: give an address, such as 127.0.0.1, or leave it out")
    with ExitStack() as stack:
        sockets, absent = [], None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, address in dict.fromkeys(found):
                try:
                    each = stack.enter_context(socket.socket(family, kind, protocol))
                    if os.name == "posix":
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    each.bind(address)
                except OSError as error:
                    # The machine may lack one family of addresses, such as IPv6.
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                    absent = error
                else:
                    sockets.append(each)
            if absent and not sockets:
                raise absent
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"{host}, port {port}: cannot be listened on ({reason}); give another --host or "
                "--port"
            ) from None
        stack.pop_all()
        return sockets


def _is_local(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


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
        InputError: it is empty, which would leave the server open, or no header can carry it.
    """
    token = os.environ.get(TOKEN)
    if token is None:
        return None
    if not token.strip():
        raise InputError(f"{TOKEN} is empty: give it a value, or unset it to serve without a token")
    token = token.strip()
    if not (token.isascii() and token.isprintable() and len(token) <= MAX_TOKEN):
        raise InputError(
            f"{TOKEN}: use up to {MAX_TOKEN} ASCII letters, digits and marks in one line, such as "
            "`openssl rand -hex 32` prints; no other can be sent by every client"
        )
    return token


def _log_as_json() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
