"""Whether a registry has an image: one request for its manifest, with the credentials of Docker."""

import json
import warnings
from typing import Any
from urllib.parse import urlsplit
from urllib.request import parse_http_list, parse_keqv_list

import docker.auth
import docker.errors
import requests

from pipeline.connection import is_loopback
from pipeline.preflight import Image

_HUB = "registry-1.docker.io"
_TIMEOUT = (5, 10)  # seconds to connect, and between two parts of an answer
_TOKEN_BYTES = 2**16  # of an answer with a token
_ACCEPT = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.list.v2",
        "docker.distribution.manifest.v2",
    )
)


class UnknownError(Exception):
    """The registry does not say whether it has the image."""


def has_image(image: Image) -> bool:
    """Return whether the image can be pulled from here.

    Raises:
        UnknownError: the registry cannot be reached, or shows nothing to this account.
    """
    host, path = image.host or _HUB, image.path
    if not image.host and "/" not in path:
        path = f"library/{path}"
    scheme = "http" if is_loopback(urlsplit(f"//{host}").hostname or "") else "https"
    address = f"{scheme}://{host}/v2/{path}/manifests/{image.digest or image.tag or 'latest'}"
    options: dict[str, Any] = {
        "headers": {"Accept": _ACCEPT},
        "timeout": _TIMEOUT,
        "allow_redirects": True,
    }
    try:
        answer = requests.head(address, auth=_Bearer(""), **options)
        if answer.status_code == 401:
            challenge = answer.headers.get("WWW-Authenticate", "")
            answer = requests.head(address, auth=_answer(host, challenge), **options)
    except (requests.RequestException, ValueError) as error:
        raise UnknownError(f"{host} cannot be asked ({type(error).__name__})") from None
    if answer.status_code in (200, 404):
        return bool(answer.status_code == 200)
    raise UnknownError(
        f"{host} does not show it to this account ({answer.status_code}); `docker login {host}` "
        "may help, and the cluster's nodes may have other credentials"
    )


class _Bearer(requests.auth.AuthBase):  # type: ignore[misc]  # requests has no types
    """A token, or nothing: without it, requests would send what .netrc has for the host."""

    def __init__(self, token: str):
        self._token = token

    def __call__(self, request: Any) -> Any:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _answer(host: str, challenge: str) -> Any:
    """Return the authentication that a registry's challenge asks for."""
    scheme, _, rest = challenge.partition(" ")
    credentials = _credentials(host)
    if scheme.lower() == "basic" and credentials:
        return credentials
    if scheme.lower() != "bearer":
        raise UnknownError(f"{host} asks for credentials (401); `docker login {host}` keeps them")
    fields = parse_keqv_list(parse_http_list(rest))
    realm = urlsplit(fields.get("realm", ""))
    if realm.scheme != "https" and not is_loopback(realm.hostname or ""):
        raise UnknownError(f"{host} wants credentials sent without TLS, which is not done")
    answer = requests.get(
        realm.geturl(),
        params={key: fields[key] for key in ("service", "scope") if key in fields},
        auth=credentials or _Bearer(""),
        timeout=_TIMEOUT,
        stream=True,
    )
    with answer:
        if answer.status_code != 200:
            raise UnknownError(f"{host} gives this account no token ({answer.status_code})")
        body = json.loads(answer.raw.read(_TOKEN_BYTES, decode_content=True))
    return _Bearer(str(body.get("token") or body.get("access_token")))


def _credentials(host: str) -> tuple[str, str] | None:
    """Return what Docker keeps for a registry: user and password."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = docker.auth.load_config().resolve_authconfig(
                docker.auth.INDEX_NAME if host == _HUB else host
            )
    except docker.errors.DockerException:  # such as a credential helper that is not installed
        return None
    if not found or not found.get("username"):
        return None
    return found["username"], found.get("password") or ""
