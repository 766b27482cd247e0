"""The way to the API of Kubeflow Pipelines: host, token, time limits, attempts, clear errors.

It knows nothing of runs and schedules. `kfp.Client` finds the cluster and holds the credentials;
its own functions have no time limits and print, so the API objects that it makes are called.
"""

import io
import ipaddress
import json
import os
import re
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kfp
import kfp_server_api as api
import urllib3

from reptile import errors
from reptile.errors import InputError

TOKEN_VARIABLE = "KF_PIPELINES_TOKEN"
BACK_OFF = (0.5, 1.0, 2.0, 4.0)  # seconds before the second attempt of a call, the third, ...
CALL_SECONDS = 30
# Mistakes of a request, which the API answers by 500 here and there.
_MISTAKE = re.compile(r"ResourceNotFoundError|BadRequestError|Invalid input error")
LOG_BYTES = 2**18  # of the end of a log that are kept


class ClusterError(errors.ClusterError):
    """The API refused a request or could not be reached.

    `status` is that of HTTP, 0 for none; `unsent` says that the request cannot have had an effect.
    """

    def __init__(
        self, message: str, status: int = 0, *, passing: bool = False, unsent: bool = False
    ):
        super().__init__(message)
        self.status = status
        self.passing = passing  # worth another attempt
        self.unsent = unsent


class _Client(kfp.Client):  # type: ignore[misc]  # kfp has no types
    """The client without its habit of trying a failing host for 25 seconds with tracebacks."""

    def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
        """Ask once; the constructor does, when it knows no namespace."""
        _restrain(self)
        return call(self.healthzs.healthz_service_get_healthz)


def _restrain(client: kfp.Client) -> None:
    """Take redirects (to login pages) and retries from the HTTP layer; `call` deals with both."""
    connection = _transport(client)
    if "://" not in connection.configuration.host:  # the address that kfp has in a cluster
        connection.configuration.host = f"http://{connection.configuration.host}"
    connection.configuration.retries = urllib3.Retry(total=0, redirect=False)
    connection.rest_client = api.rest.RESTClientObject(connection.configuration)


def _transport(client: kfp.Client) -> api.ApiClient:
    return client.healthzs.healthz_service_get_healthz.__self__.api_client


@dataclass(frozen=True)
class _TokenFile:
    """A token read anew for every request, because those of Kubernetes are replaced hourly."""

    path: Path

    def refresh_api_key_hook(self, configuration: Any) -> None:
        """Put the token where the client looks for it."""
        configuration.api_key["authorization"] = self.token()

    def token(self) -> str:
        try:
            return _checked_token(self.path.read_text(encoding="utf-8"), str(self.path))
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: not a token, which is one line of text") from None
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; give another --token-file") from None


def _checked_token(text: str, source: str) -> str:
    """Return the token in `text`; nothing of it is shown in an error."""
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(f"{source}: not a token, which is one line without spaces")
    return token


@dataclass(frozen=True)
class Connection:
    """The client, the namespace (None where users share one), the host ("" if kfp found it)."""

    client: Any
    namespace: str | None
    host: str


def connect(
    host: str | None,
    namespace: str | None = None,
    token_file: Path | None = None,
    ca_certificate: Path | None = None,
) -> Connection:
    """Reach the API at `host`, or where kfp finds it: inside the cluster, or by the kubeconfig.

    The token is that of `token_file`, or of the environment variable KF_PIPELINES_TOKEN.

    Raises:
        InputError: the options are wrong, or the token would be sent in the clear.
        ClusterError: the host cannot be reached or refuses.
    """
    token = None
    if token_file:
        _TokenFile(token_file).token()
    elif TOKEN_VARIABLE in os.environ:
        token = _checked_token(os.environ[TOKEN_VARIABLE], TOKEN_VARIABLE)
    if host:
        host = _checked_host(host, secret=bool(token or token_file))
    elif token or token_file:
        raise InputError("a token needs the host it is for; give --host")
    if ca_certificate and not ca_certificate.is_file():
        raise InputError(f"{ca_certificate}: no such file; give --ca-cert a PEM file")
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        client = _Client(
            host=host,
            existing_token=token,
            credentials=_TokenFile(token_file) if token_file else None,
            ssl_ca_cert=str(ca_certificate) if ca_certificate else None,
        )
    _restrain(client)
    return Connection(client, namespace or client.get_user_namespace() or None, host or "")


def _checked_host(host: str, *, secret: bool) -> str:
    host = host.rstrip("/") if "://" in host else f"https://{host.rstrip('/')}"
    parts = urlsplit(host)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"host {host!r} is not an address like https://kubeflow.example.org")
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError(
            f"host {parts.hostname}: give the plain address, without user, '?' or '#'; "
            f"a token goes into --token-file or {TOKEN_VARIABLE}"
        )
    if secret and parts.scheme == "http" and not is_loopback(parts.hostname):
        raise InputError(
            f"host {host}: a token is not sent over plain http; use https, or a tunnel "
            "(kubectl port-forward) to localhost; inside the cluster, leave --host and token out"
        )
    return host


def is_loopback(hostname: str) -> bool:
    """Return whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return hostname == "localhost"


def call(
    function: Any,
    *arguments: Any,
    repeatable: bool = True,
    attempts: int = 5,
    seconds: int = CALL_SECONDS,
    **options: Any,
) -> Any:
    """Call a function of an API object with a time limit, again if that can help.

    What is not `repeatable` (it makes something) is repeated only if it cannot have arrived.
    Options that are None are left out.

    Raises:
        ClusterError: in one line, what is wrong and what to do.
    """
    connection = function.__self__.api_client
    host = connection.configuration.host
    options = {name: value for name, value in options.items() if value is not None}
    for attempt in range(attempts):
        if attempt:
            time.sleep(BACK_OFF[min(attempt, len(BACK_OFF)) - 1])
        try:
            answer = function(*arguments, _request_timeout=seconds, **options)
        except (api.ApiException, urllib3.exceptions.HTTPError) as error:
            problem = _explained(error, host)
        else:
            if "json" in (connection.last_response.getheader("content-type") or ""):
                return answer
            problem = _not_kubeflow(host)
        if not (problem.unsent or (problem.passing and repeatable)):
            break
    raise problem


def server_version(client: kfp.Client) -> str:
    """Return the version that the server says it has, "unknown" where it says none.

    kfp's type of the answer has no such field, so it is read from the text.
    """
    call(client.healthzs.healthz_service_get_healthz)
    answer = json.loads(_transport(client).last_response.data)
    return str(answer.get("tag_name") or "unknown")


def check_version(version: str, needed: tuple[int, int]) -> str:
    """Return what there is to remark on a server's version, "" if nothing.

    Args:
        version: as the server says it.
        needed: the first release whose servers take the pipeline.

    Raises:
        ClusterError: the server is too old.
    """
    needs = f"the pipeline needs Kubeflow Pipelines {needed[0]}.{needed[1]} or later"
    match = re.match(r"v?(\d+)\.(\d+)", version)
    if not match:
        return f"the server does not say its version ({version}); {needs}"
    if (int(match[1]), int(match[2])) < needed:
        raise ClusterError(
            f"the server has version {version}; {needs}; upgrade it, or give --pipeline one that "
            "`python -m pipeline compile --backend` has made for an earlier release"
        )
    return ""


def read_log(client: kfp.Client, run: str, node: str) -> str:
    """Return the end of the log of a run's node (Argo's id of a pod), or "" if there is none.

    The only route for logs is of another version of the API, for which kfp has no function.
    """
    try:
        answer = _transport(client).call_api(
            "/apis/v1alpha1/runs/{run}/nodes/{node}/log",
            "GET",
            path_params={"run": run, "node": node},
            auth_settings=["Bearer"],
            _return_http_data_only=True,
            _preload_content=False,
            _request_timeout=CALL_SECONDS,
        )
        text = b""
        for chunk in answer.stream(2**16):
            text += chunk
            if len(text) > 2 * LOG_BYTES:
                text = text[-LOG_BYTES:]
    except (api.ApiException, urllib3.exceptions.HTTPError):
        return ""  # a log helps, but is not what was asked for
    # What cannot be read is answered with status 200.
    return "" if text.startswith(b'{"error_message"') else text.decode(errors="replace")


def _not_kubeflow(host: str, status: int = 0) -> ClusterError:
    return ClusterError(
        f"{host} does not answer like the API of Kubeflow Pipelines, but like a web page; give the "
        "address under which its site is (often ending in /pipeline), and a token if it asks to "
        "sign in",
        status,
    )


def _explained(error: Exception, host: str) -> ClusterError:
    if isinstance(error, api.ApiException):
        return _refusal(int(error.status or 0), error.body, host)
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, urllib3.exceptions.SSLError):
        return ClusterError(
            f"{host}: no trusted TLS connection; if the cluster has a certificate authority of "
            "its own, give its certificate by --ca-cert"
        )
    if isinstance(reason, urllib3.exceptions.LocationValueError):
        return ClusterError(f"{host}: not an address; give another --host")
    unsent = isinstance(
        reason, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
    )
    return ClusterError(
        f"{host} cannot be reached ({type(reason).__name__}); check --host, the network, or the "
        "tunnel (kubectl port-forward)",
        passing=True,
        unsent=unsent,
    )


def _refusal(status: int, body: str | None, host: str) -> ClusterError:
    said = _message(body)
    if status == 0 or 300 <= status < 400 or (status == 404 and not said):
        return _not_kubeflow(host, status)
    if status == 401:
        way_out = f"give a valid token by --token-file or {TOKEN_VARIABLE}; it may have expired"
        return ClusterError(f"{host} does not know who asks (401); {way_out}", status)
    meaning = {
        403: "does not allow this (403); ask for the right to it, or give another --namespace",
        404: "has no such thing (404); it may have been deleted",
        409: "has something of that name already (409); take another name",
        429: "has too many requests (429); try again later",
    }.get(status)
    failed = status >= 500 and not _MISTAKE.search(said)
    if meaning is None and not failed:
        meaning = f"refuses the request ({status})"
    elif meaning is None:
        meaning = (
            f"failed ({status}); it may have done part of it, so look there before you try again"
        )
    return ClusterError(
        f"{host} {meaning}" + (f"; it says: {said}" if said else ""),
        status,
        passing=status == 429 or failed,
    )


def _message(body: str | None) -> str:
    """Return the reason that the API gives, or nothing if it is not its way of saying it.

    Its messages are chains of which the end says most; some have that end as a detail.
    """
    try:
        answer = json.loads(body or "")
        text = answer.get("message") or answer.get("error_message") or answer.get("error") or ""
        detail = (answer.get("details") or [{}])[0].get("message")
    except (ValueError, AttributeError, LookupError):
        return ""
    if detail and detail != "Internal Server Error":
        text = detail
    line = str(text).strip().partition("\n")[0]
    return line if len(line) <= 300 else f"…{line[-300:]}"
