"""A real `reptile serve` process on a free port, and the resources it uses.

For load tests and fault tests, which choose the requests.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from benchmarks.machine import ROOT
from reptile.errors import InputError

HOST = "127.0.0.1"
READY = "/v2/health/ready"
_LOG_TAIL = 2000  # characters of it that an error shows


class Footprint(NamedTuple):
    """Resources of a process; from /proc, so on Linux only."""

    resident: int  # bytes
    peak: int  # bytes, maximum so far
    threads: int
    files: int  # descriptors


class Answer(NamedTuple):
    """A response, unchanged."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        """Parse the body."""
        return json.loads(self.body)


class Server:
    """A running server; a context manager that ends it."""

    def __init__(
        self, bundle: Path, *options: str, wait: float = 60.0, prefix: Sequence[str] = ()
    ) -> None:
        """Start a server and wait until it is ready.

        Args:
            bundle: what it serves.
            options: further options of `reptile serve`, such as `--tasks` and a folder.
            wait: maximum seconds until it is ready.
            prefix: a command that runs the command after it, such as `nice`.

        Raises:
            InputError: it ended, or was not ready in time; with its output.
        """
        self.port = _free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server runs)
        # A new session: Ctrl-C in the terminal reaches it only through `stop`.
        where = ("--host", HOST, "--port", str(self.port))
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "reptile", "serve", str(bundle), *where, *options],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait_until_ready(wait)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """Its standard output and error so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    @property
    def footprint(self) -> Footprint:
        """The resources that its process uses now."""
        proc = Path(f"/proc/{self.process.pid}")
        lines = (proc / "status").read_text(encoding="utf-8").splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return Footprint(
            resident=1024 * int(status["VmRSS"].split()[0]),
            peak=1024 * int(status["VmHWM"].split()[0]),
            threads=int(status["Threads"]),
            files=sum(1 for _ in (proc / "fd").iterdir()),
        )

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        wait: float = 60.0,
    ) -> Answer:
        """Send a request on a new connection; a body that is not bytes is sent as JSON.

        Raises:
            OSError, http.client.HTTPException: no response.
        """
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        connection = http.client.HTTPConnection(HOST, self.port, timeout=wait)
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            received = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, received, response.read())
        finally:
            connection.close()

    def stop(self, wait: float = 30.0) -> int:
        """Stop it (SIGTERM) and return its exit code; kill it if it does not end in time."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(wait)
        except subprocess.TimeoutExpired:
            self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """Kill it without a chance to clean up (SIGKILL)."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _wait_until_ready(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                code = self.process.returncode
                raise InputError(f"the server ended with {code}: {self.log[-_LOG_TAIL:]}")
            try:
                if self.request("GET", READY, wait=seconds).status == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass  # not listening yet
            time.sleep(0.05)
        raise InputError(f"the server was not ready in {seconds:g} s: {self.log[-_LOG_TAIL:]}")


def json_request(method: str, path: str, value: Any) -> bytes:
    """Return a whole HTTP/1.1 request with a JSON body, as it goes over the wire."""
    return raw_request(method, path, json.dumps(value).encode(), "application/json")


def raw_request(
    method: str, path: str, body: bytes, content_type: str, more: Sequence[str] = ()
) -> bytes:
    """Return a whole HTTP/1.1 request, as it goes over the wire."""
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: {HOST}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *more,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def binary_request(path: str, images: npt.NDArray[np.uint8], output: str) -> bytes:
    """Return a whole HTTP/1.1 request of the Open Inference Protocol with a binary tensor."""
    tensor = {
        "name": "images",
        "shape": images.shape,
        "datatype": "UINT8",
        "parameters": {"binary_data_size": images.nbytes},
    }
    wanted = {"name": output, "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
    return raw_request(
        "POST",
        path,
        head + images.tobytes(),
        "application/octet-stream",
        [f"Inference-Header-Content-Length: {len(head)}"],
    )


def multipart(parts: Sequence[tuple[str, str, bytes]]) -> tuple[bytes, str]:
    """Encode files as multipart/form-data; return the body and its content type.

    Args:
        parts: field name, file name and content of each.
    """
    boundary = "part-of-a-load-test"
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n".encode()
        + content
        + b"\r\n"
        for field, name, content in parts
    )
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
