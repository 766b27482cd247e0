"""Downloads from a real https server on this machine; nothing here needs a network."""

import datetime
import hashlib
import http.server
import ipaddress
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from reptile import cli
from reptile.data import download as downloads
from reptile.data.download import DATASETS, RemoteDataset, RemoteFile, dataset_named, download
from reptile.errors import InputError
from reptile.settings import load_settings

CONTENT = np.random.default_rng(0).bytes(900_000)
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


@dataclass
class Server:
    """What the server is told to do, and what it was asked."""

    port: int = 0
    content: bytes = CONTENT
    cut_after: int | None = None
    """Bytes of the body, after which the connection ends."""
    ranges: bool = True
    first: int | None = None
    """The first byte that an answer to a Range says it has."""
    length: bool = True
    status: int = 200
    location: str = ""
    asked: list[str] = field(default_factory=list)
    """The Range of each request, "" where there was none."""

    def url(self, name: str = "some.bin", scheme: str = "https") -> str:
        return f"{scheme}://127.0.0.1:{self.port}/{name}"


def handler_of(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            server.asked.append(asked)
            if server.location and self.path != "/moved.bin":
                self.send_response(302)
                self.send_header("Location", server.location)
                self.end_headers()
                return
            if server.status != 200:
                self.send_error(server.status)
                return
            wanted = re.fullmatch(r"bytes=(\d+)-", asked) if asked and server.ranges else None
            start = int(wanted[1]) if wanted else 0
            if start and start >= len(server.content):
                self.send_error(416)
                return
            body = server.content[start:]
            self.send_response(206 if start else 200)
            if start:
                whole = len(server.content)
                first = start if server.first is None else server.first
                self.send_header("Content-Range", f"bytes {first}-{whole - 1}/{whole}")
            if server.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: server.cut_after])

        def log_message(self, *values: object) -> None:
            pass

    return Handler


class QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of these tests."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate that this machine's loopback address signs for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "certificate.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture
def server(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    told = Server()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with QuietServer(("127.0.0.1", 0), handler_of(told)) as listening:
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
        told.port = listening.server_address[1]
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield told
        listening.shutdown()
        thread.join()


def dataset(*urls: str, checksum: str = SHA256) -> RemoteDataset:
    return RemoteDataset("unused", tuple(RemoteFile(url, checksum, 1) for url in urls), ())


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("checksum", [SHA256, MD5])
@pytest.mark.parametrize("length", [True, False])
def test_files_arrive_whole_with_progress_to_the_end(
    server: Server, tmp_path: Path, checksum: str, length: bool
) -> None:
    server.length = length
    seen: list[tuple[str, int, int | None]] = []
    download(
        dataset(server.url("a.bin"), server.url("b.bin"), checksum=checksum),
        tmp_path / "new/folder",
        lambda *told: seen.append(told),
    )
    assert names_in(tmp_path / "new/folder") == ["a.bin", "b.bin"]
    assert (tmp_path / "new/folder/b.bin").read_bytes() == CONTENT
    total = len(CONTENT) if length else None
    assert seen[-1] == ("b.bin", len(CONTENT), total)
    assert seen == sorted(seen)


def test_a_file_that_is_there_is_checked_and_not_fetched_again(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "some.bin").write_bytes(CONTENT)
    download(dataset(server.url()), tmp_path)
    assert server.asked == []
    (tmp_path / "some.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"not the published file .* move it away"):
        download(dataset(server.url()), tmp_path)
    assert (tmp_path / "some.bin").read_bytes() == b"mine"


def test_a_cut_connection_is_said_and_the_next_try_goes_on(server: Server, tmp_path: Path) -> None:
    server.cut_after = 300_000
    with pytest.raises(InputError, match=r"after 300,000 of 900,000 bytes; run the same again"):
        download(dataset(server.url()), tmp_path)
    assert names_in(tmp_path) == ["some.bin.part"]
    with pytest.raises(InputError, match="after 600,000 of 900,000"):
        download(dataset(server.url()), tmp_path)
    server.cut_after = None
    download(dataset(server.url()), tmp_path)
    assert server.asked == ["", "bytes=300000-", "bytes=600000-"]
    assert names_in(tmp_path) == ["some.bin"]
    assert (tmp_path / "some.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "some.bin.part").write_bytes(b"x" * 950_000)
    server.ranges = False
    download(dataset(server.url()), tmp_path)
    assert (tmp_path / "some.bin").read_bytes() == CONTENT


def test_a_range_that_was_not_asked_for_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "some.bin.part").write_bytes(CONTENT[:1000])
    server.first = 2000
    with pytest.raises(InputError, match="the server sends from byte 2,000, not 1,000"):
        download(dataset(server.url()), tmp_path)
    assert (tmp_path / "some.bin.part").read_bytes() == CONTENT[:1000]


def test_a_whole_part_needs_nothing_more(server: Server, tmp_path: Path) -> None:
    (tmp_path / "some.bin.part").write_bytes(CONTENT)
    download(dataset(server.url()), tmp_path)
    assert names_in(tmp_path) == ["some.bin"]


@pytest.mark.parametrize("part", [b"", b"x" * 1000, b"x" * 950_000])
def test_wrong_content_is_refused_and_thrown_away(
    server: Server, tmp_path: Path, part: bytes
) -> None:
    (tmp_path / "some.bin.part").write_bytes(part)
    server.content = CONTENT if part else CONTENT[:-1] + b"!"
    with pytest.raises(InputError, match=f"not the published file .{SHA256}. and was thrown away"):
        download(dataset(server.url()), tmp_path)
    assert names_in(tmp_path) == []


def test_more_bytes_than_published_are_not_kept_coming(server: Server, tmp_path: Path) -> None:
    server.content = bytes(1_500_000)
    with pytest.raises(InputError, match="more than 1 MB; not that file"):
        download(dataset(server.url()), tmp_path)


def test_a_redirect_stays_on_https(server: Server, tmp_path: Path) -> None:
    server.location = server.url("moved.bin")
    download(dataset(server.url()), tmp_path)
    assert (tmp_path / "some.bin").read_bytes() == CONTENT
    server.location = server.url("moved.bin", scheme="http")
    with pytest.raises(InputError, match="redirects away from https; refused"):
        download(dataset(server.url("other.bin")), tmp_path)
    with pytest.raises(InputError, match="only https"):
        download(dataset(server.url("other.bin", scheme="http")), tmp_path)
    with pytest.raises(InputError, match="only https"):
        download(dataset(f"file://{tmp_path}/some.bin2"), tmp_path)


def test_a_certificate_that_nobody_trusts_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(InputError, match=r"127\.0\.0\.1 cannot be reached .*CERTIFICATE_VERIFY"):
        download(dataset(server.url()), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("status", [404, 403, 500])
def test_an_answer_that_is_no_file_is_one_line(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(InputError, match=f"the server answers {status}"):
        download(dataset(server.url()), tmp_path)


def test_no_network_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as closed:
        port = closed.server_address[1]
    url = f"https://127.0.0.1:{port}/some.bin"
    with pytest.raises(InputError, match=r"cannot be reached \(.*refused\); with no network") as it:
        download(dataset(url), tmp_path / "folder")
    assert "\n" not in str(it.value)
    assert url in str(it.value)
    assert str(tmp_path / "folder") in str(it.value)


def test_a_name_without_an_address_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    """`.invalid` is reserved never to resolve, so this is what a machine without a network says."""
    code = (
        "import reptile.data.download as d; from reptile import cli;"
        "file = d.RemoteFile('https://nowhere.invalid/a.gz', 'md5:0', 1);"
        "d.DATASETS['mnist'] = d.RemoteDataset('mnist', (file,), ());"
        "cli.run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "download", "mnist"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: nowhere\.invalid cannot be reached \(.*\).*\n", done.stderr)


def test_the_command_says_how_to_version_and_prepare(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    some = dataset(server.url())._replace(folder="datasets/some", settings=("prepare.test=9",))
    monkeypatch.setitem(downloads.DATASETS, "some", some)
    cli.app(["data", "download", "some"], standalone_mode=False)
    assert names_in(tmp_path / "datasets/some") == ["some.bin"]
    said = capsys.readouterr().out
    assert "dvc add datasets/some\n" in said
    assert "reptile prepare -S prepare.source=datasets/some -S prepare.test=9\n" in said


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_is_complete(name: str, root: Path) -> None:
    settings = [f"prepare.source={DATASETS[name].folder}", *DATASETS[name].settings]
    assert load_settings(root / "params.yaml", settings).prepare.source == DATASETS[name].folder
    for file in DATASETS[name].files:
        assert file.url.startswith("https://")
        assert "@" not in file.url
        assert re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", file.checksum)
    names = [file.name for file in DATASETS[name].files]
    assert len(set(names)) == len(names)


def test_an_unknown_name_and_mini_imagenet_say_what_there_is() -> None:
    with pytest.raises(InputError, match="there are omniglot, mnist, emnist, cifar-fs, fc100"):
        dataset_named("cifar")
    with pytest.raises(InputError, match="ImageNet's, which everyone has to get from there"):
        dataset_named("mini-imagenet")
