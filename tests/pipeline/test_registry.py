"""Asking a registry for an image, with Docker's credentials and without."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_server import RegistryServer

from pipeline.preflight import Image, parse_image
from pipeline.registry import UnknownError, has_image

IMAGES = ("team/x:1", f"team/x@sha256:{64 * 'a'}")


@pytest.fixture(params=["", "Basic", "Bearer"])
def registry(request: pytest.FixtureRequest) -> Iterator[RegistryServer]:
    server = RegistryServer(*IMAGES, challenge=request.param)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path


def at(registry: RegistryServer, image: str) -> Image:
    return parse_image(f"{registry.host}/{image}")


def test_an_image_is_found_by_tag_and_by_digest(registry: RegistryServer, home: Path) -> None:
    registry.write_credentials(home, "me", "s3cr3t")
    for image in IMAGES:
        assert has_image(at(registry, image))
    assert not has_image(at(registry, "team/x:2"))
    assert not has_image(at(registry, "team/y:1"))
    assert not has_image(at(registry, "team/x"))  # its tag is `latest`


def test_credentials_go_to_the_registry_that_asks_for_them(
    registry: RegistryServer, home: Path
) -> None:
    registry.write_credentials(home, "me", "s3cr3t")
    has_image(at(registry, IMAGES[0]))
    (first, *_) = registry.heard
    assert first[1] == ""
    assert not [path for path, _ in registry.heard if "s3cr3t" in path]
    assert any(given for _, given in registry.heard) == bool(registry.challenge)


@pytest.mark.parametrize("challenge", ["Basic", "Bearer"])
@pytest.mark.parametrize("password", ["wrong", None])
def test_an_image_that_is_not_shown_is_unknown(
    home: Path, challenge: str, password: str | None
) -> None:
    registry = RegistryServer(*IMAGES, challenge=challenge)
    if password:
        registry.write_credentials(home, "me", password)
    try:
        with pytest.raises(UnknownError, match=r"docker login|no token \(401\)") as error:
            has_image(at(registry, IMAGES[0]))
    finally:
        registry.close()
    assert "wrong" not in str(error.value)


def test_credentials_are_not_sent_without_tls(home: Path) -> None:
    registry = RegistryServer(*IMAGES, challenge="Bearer", realm="http://tokens.example/token")
    registry.write_credentials(home, "me", "s3cr3t")
    try:
        with pytest.raises(UnknownError, match="without TLS"):
            has_image(at(registry, IMAGES[0]))
    finally:
        registry.close()


def test_what_netrc_has_is_not_sent(home: Path) -> None:
    registry = RegistryServer(*IMAGES)
    (home / ".netrc").write_text("machine 127.0.0.1 login me password other")
    try:
        assert has_image(at(registry, IMAGES[0]))
    finally:
        registry.close()
    assert [given for _, given in registry.heard] == [""]


@pytest.mark.filterwarnings("error")
def test_a_credential_helper_that_is_not_installed_is_not_missed(home: Path) -> None:
    registry = RegistryServer(*IMAGES)
    (home / "config.json").write_text('{"credsStore": "no-such-helper"}')
    registry.challenge = "Basic"
    try:
        with pytest.raises(UnknownError, match="docker login"):
            has_image(at(registry, IMAGES[0]))
    finally:
        registry.close()


def test_a_registry_that_is_not_there_or_not_one_is_unknown() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        host = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(UnknownError, match=f"{host} cannot be asked"):
        has_image(parse_image(f"{host}/x:1"))
