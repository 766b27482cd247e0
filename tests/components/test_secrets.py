"""Credentials that are mounted as files: DVC and git get them, and nothing else does."""

import asyncio
import base64
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import asyncssh
import botocore.session
import pytest
import yaml
from object_store import BUCKET, ObjectStore, object_store

from components.fetch import fetch
from components.push import publish
from components.secrets import configure_remotes, read_secret, remote_options
from reptile.errors import InputError

NOWHERE = Path("/nowhere")


def run(folder: Path, *command: str, **environment: str) -> str:
    program = Path(sys.executable).parent / command[0]
    name = str(program) if program.is_file() else command[0]
    done = subprocess.run(
        [name, *command[1:]],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def stores() -> Iterator[tuple[ObjectStore, ObjectStore]]:
    """DVC's, and the one that the launcher uses; each knows its own account alone."""
    with object_store() as ours, object_store() as theirs:
        yield ours, theirs


@pytest.fixture
def launcher(
    stores: tuple[ObjectStore, ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> ObjectStore:
    """The other store, whose keys are in the environment, as the launcher reads them."""
    _, theirs = stores
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", theirs.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", theirs.secret)
    monkeypatch.setenv("AWS_ENDPOINT_URL", theirs.endpoint)
    return theirs


def as_launcher() -> Any:
    """A client by the environment alone, as AWS's default chain makes one."""
    return botocore.session.get_session().create_client("s3", region_name="us-east-1")


@pytest.fixture(scope="module")
def repository(
    stores: tuple[ObjectStore, ObjectStore], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A repository whose data lie in DVC's store; its configuration names no credentials."""
    ours, _ = stores
    keys = {
        "AWS_ACCESS_KEY_ID": ours.key,
        "AWS_SECRET_ACCESS_KEY": ours.secret,
        "AWS_ENDPOINT_URL": ours.endpoint,
    }
    folder = tmp_path_factory.mktemp("repository")
    run(folder, "git", "init", "--quiet", "--initial-branch=main")
    for name, value in (("user.name", "Test"), ("user.email", "test@example.org")):
        run(folder, "git", "config", name, value)
    run(folder, "dvc", "init", "--quiet")
    run(folder, "dvc", "remote", "add", "--quiet", "--default", "team", f"s3://{BUCKET}/dvc")
    (folder / "data").mkdir()
    (folder / "data/letters.txt").write_text("letters")
    run(folder, "dvc", "add", "--quiet", "data")
    run(folder, "dvc", "push", "--quiet", **keys)
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "data")
    run(folder, "git", "tag", "first")
    run(folder, "git", "switch", "--quiet", "--create", "side")
    return folder


@pytest.fixture(scope="module")
def md5(repository: Path) -> str:
    return str(yaml.safe_load((repository / "data.dvc").read_text())["outs"][0]["md5"])


def test_data_come_by_the_mounted_keys_while_the_launcher_keeps_its_own(
    stores: tuple[ObjectStore, ObjectStore],
    launcher: ObjectStore,
    repository: Path,
    md5: str,
    tmp_path: Path,
) -> None:
    secret = stores[0].mount(tmp_path / "secret")
    before = dict(os.environ)
    fetch(f"file://{repository}", "first", "data", md5, tmp_path, secret, NOWHERE)
    assert (tmp_path / "data/letters.txt").read_text() == "letters"
    assert dict(os.environ) == before
    as_launcher().put_object(Bucket=BUCKET, Key="artifact", Body=b"of the launcher")
    assert launcher.names() == ["artifact"]
    assert "artifact" not in stores[0].names()
    launcher.client().delete_object(Bucket=BUCKET, Key="artifact")


def test_a_bundle_is_pushed_by_the_mounted_keys(
    stores: tuple[ObjectStore, ObjectStore], launcher: ObjectStore, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    secret = stores[0].mount(tmp_path / "secret")
    publish(bundle, f"s3://{BUCKET}/bundles", tmp_path / "pointer", secret)
    md5 = yaml.safe_load((tmp_path / "pointer").read_text())["outs"][0]["md5"]
    assert f"bundles/files/md5/{md5[:2]}/{md5[2:]}" in stores[0].names()
    assert launcher.names() == []


def test_without_the_secret_the_environment_is_used_and_its_store_refuses(
    launcher: ObjectStore, repository: Path, md5: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch(f"file://{repository}", "first", "data", md5, tmp_path, NOWHERE, NOWHERE)


def test_a_refusal_shows_no_key(
    stores: tuple[ObjectStore, ObjectStore], repository: Path, md5: str, tmp_path: Path
) -> None:
    secret = stores[0]._replace(secret="not-the-secret").mount(tmp_path / "secret")
    with pytest.raises(InputError, match="cannot be fetched") as refused:
        fetch(f"file://{repository}", "first", "data", md5, tmp_path, secret, NOWHERE)
    assert "not-the-secret" not in str(refused.value)


def test_the_configuration_is_private_and_leaves_what_the_repository_says(
    stores: tuple[ObjectStore, ObjectStore], tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    run(folder, "dvc", "init", "--quiet", "--no-scm")
    run(folder, "dvc", "remote", "add", "--quiet", "here", str(tmp_path / "here"))
    run(folder, "dvc", "remote", "add", "--quiet", "there", "s3://bucket/data")
    endpoint = "https://store.example.org"
    run(folder, "dvc", "remote", "modify", "--quiet", "there", "endpointurl", endpoint)
    secret = stores[0].mount(tmp_path / "secret")
    configure_remotes(folder / ".dvc", secret)
    assert (folder / ".dvc/config.local").stat().st_mode & 0o777 == 0o600
    listed = run(folder, "dvc", "config", "--list")
    assert f"remote.there.endpointurl={endpoint}" in listed
    assert f"remote.there.access_key_id={stores[0].key}" in listed
    assert "remote.here.access_key_id" not in listed

    (folder / ".dvc/config.local").unlink()
    configure_remotes(folder / ".dvc", NOWHERE)
    assert not (folder / ".dvc/config.local").exists()


def test_googles_key_is_given_by_its_path_and_other_keys_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "GOOGLE_APPLICATION_CREDENTIALS").write_text('{"type": "service_account"}')
    (tmp_path / "ca.crt").write_text("of no store")
    path = str(tmp_path / "GOOGLE_APPLICATION_CREDENTIALS")
    assert remote_options("gs://bucket/x", tmp_path) == {"credentialpath": path}
    assert remote_options("s3://bucket/x", tmp_path) == {}
    assert remote_options("/a/folder", tmp_path) == {}
    assert set(read_secret(tmp_path)) == {"GOOGLE_APPLICATION_CREDENTIALS", "ca.crt"}


TOKEN = "a-token-of-git"


@pytest.fixture(scope="module")
def over_http(repository: Path) -> Iterator[str]:
    """The repository by git's own server program, which asks for the token."""
    expected = "Basic " + base64.b64encode(f"team:{TOKEN}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != expected:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="git"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            path, _, query = self.path.partition("?")
            request = {
                "GIT_PROJECT_ROOT": str(repository),
                "GIT_HTTP_EXPORT_ALL": "1",
                "REQUEST_METHOD": self.command,
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "CONTENT_LENGTH": str(len(body)),
            }
            answer = subprocess.run(
                ["git", "http-backend"], input=body, env=os.environ | request, capture_output=True
            ).stdout
            head, _, content = answer.partition(b"\r\n\r\n")
            self.send_response(200)
            for line in head.decode().splitlines():
                self.send_header(*line.split(": ", 1))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/.git"
    server.shutdown()


@pytest.fixture(scope="module")
def over_ssh(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """The repository by an SSH server that lets one key in; its address, and a secret for it."""
    secret = tmp_path_factory.mktemp("git")
    key, host = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    (secret / "ssh-privatekey").write_bytes(key.export_private_key())

    async def serve(process: "asyncssh.SSHServerProcess[bytes]") -> None:
        program, _, path = (process.command or "").partition(" ")
        assert program == "git-upload-pack"
        git = await asyncio.create_subprocess_exec(
            "git", "upload-pack", path.strip("'"), stdin=-1, stdout=-1
        )
        await process.redirect(stdin=git.stdin, stdout=git.stdout)
        process.exit(await git.wait())

    class Server(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return True

        def public_key_auth_supported(self) -> bool:
            return True

        def validate_public_key(self, username: str, key_: asyncssh.SSHKey) -> bool:
            return bool(username == "git" and key_ == key.convert_to_public())

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.create_server(
            Server, "127.0.0.1", 0, server_host_keys=[host], process_factory=serve, encoding=None
        )

    listening = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    port = listening.get_port()
    public = host.export_public_key().decode().strip()
    (secret / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
    yield f"ssh://git@127.0.0.1:{port}{repository}", secret
    loop.call_soon_threadsafe(loop.stop)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    folder = tmp_path / "git-secret"
    folder.mkdir()
    (folder / "username").write_text("team")
    (folder / "password").write_text(TOKEN + "\n")
    return folder


@pytest.mark.parametrize("revision", ["first", "side", "", "commit"])
def test_a_private_repository_is_cloned_by_a_token(
    revision: str,
    over_http: str,
    token: Path,
    stores: tuple[ObjectStore, ObjectStore],
    repository: Path,
    md5: str,
    tmp_path: Path,
) -> None:
    if revision == "commit":
        revision = run(repository, "git", "rev-parse", "HEAD")
    secret = stores[0].mount(tmp_path / "secret")
    fetch(over_http, revision, "data", md5, tmp_path, secret, token)
    assert (tmp_path / "data/letters.txt").read_text() == "letters"


def test_a_private_repository_is_cloned_by_a_key(
    over_ssh: tuple[str, Path],
    stores: tuple[ObjectStore, ObjectStore],
    md5: str,
    tmp_path: Path,
) -> None:
    address, key = over_ssh
    secret = stores[0].mount(tmp_path / "secret")
    fetch(address, "first", "data", md5, tmp_path, secret, key)
    assert (tmp_path / "data/letters.txt").read_text() == "letters"


def test_another_host_with_the_same_name_is_refused(
    over_ssh: tuple[str, Path], tmp_path: Path
) -> None:
    address, key = over_ssh
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
    place = (key / "known_hosts").read_text().split()[0]
    (tmp_path / "ssh-privatekey").write_bytes((key / "ssh-privatekey").read_bytes())
    (tmp_path / "known_hosts").write_text(f"{place} {other}\n")
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch(address, "first", "data", "0", tmp_path / "out", NOWHERE, tmp_path)


@pytest.mark.parametrize(
    ("address", "values", "words"),
    [
        ("ssh://git@host.example.org/x.git", {"ssh-privatekey": "k"}, "known_hosts"),
        ("git@host.example.org:x.git", {"password": "t"}, "ssh-privatekey and known_hosts"),
        ("https://host.example.org/x.git", {"ssh-privatekey": "k"}, "needs password"),
        ("http://host.example.org/x.git", {"password": "secret"}, "plain http"),
    ],
)
def test_credentials_that_do_not_fit_the_address_are_refused_before_it_is_asked(
    address: str, values: dict[str, str], words: str, tmp_path: Path
) -> None:
    for name, value in values.items():
        (tmp_path / name).write_text(value)
    with pytest.raises(InputError, match=words) as refused:
        fetch(address, "main", "data", "0", tmp_path / "out", NOWHERE, tmp_path)
    assert "secret" not in str(refused.value).replace("git secret", "")


def test_a_wrong_token_and_a_wrong_revision_are_one_sentence_without_the_token(
    over_http: str, token: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="has no revision no-such"):
        fetch(over_http, "no-such", "data", "0", tmp_path / "out", NOWHERE, token)
    (token / "password").write_text("another")
    with pytest.raises(InputError, match="refused the credentials") as refused:
        fetch(over_http, "first", "data", "0", tmp_path / "out", NOWHERE, token)
    assert "another" not in str(refused.value)
