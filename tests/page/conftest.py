"""A bundle, a server on it, Chromium and Node, for the tests of the page and of its modules."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from bundles import make_checkpoint, write_bundle
from patterns import make_data
from schemas import validate_bundle

from reptile.data.prepare import prepare
from reptile.data.readers.glyphs import write_glyphs
from reptile.export.write import export_bundle
from reptile.learn.run import run_training
from reptile.settings import (
    EvaluateSettings,
    ExportSettings,
    ModelSettings,
    PrepareSettings,
    TrainSettings,
)

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Neither a GPU nor the vendor's services belong to the tests; a container has no user namespaces.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP plain.test 127.0.0.1",  # unlike localhost, no secure context
]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle after a few seconds of training: enough for symbols that differ clearly."""
    folder = tmp_path_factory.mktemp("tiny")
    write_glyphs(folder / "glyphs.zip", alphabets=8, characters=8, hands=10)
    data = prepare(PrepareSettings(source=str(folder / "glyphs.zip"), images_per_class=10), folder)
    settings = TrainSettings.model_validate(
        {
            "model": {"filters": 32, "downsampling": "stride"},
            "train_shots": 5,
            "meta_iterations": 300,
        }
    )
    checkpoint = run_training(settings, data, folder / "work")
    export_bundle(
        ExportSettings(name="tiny"),
        checkpoint,
        data,
        None,
        folder / "bundle",
        protocol=EvaluateSettings(steps=50, batch=5),
    )
    validate_bundle(folder / "bundle")
    return folder / "bundle"


@contextmanager
def serving(bundle: Path, folder: Path, **environment: str) -> Iterator[str]:
    """Run `reptile serve` on a bundle until it is no longer needed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "reptile", "serve", str(bundle), "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--tasks", str(folder / "tasks")],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=log,
            stderr=log,
        )
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    urlopen(f"http://127.0.0.1:{port}/v2/health/ready").close()
                    break
                except URLError:
                    said = (folder / "log").read_text()
                    assert process.poll() is None, said
                    assert time.monotonic() < until, said
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture
def serve_bundle(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Serve another bundle, one a test, and return its address."""
    with ExitStack() as stack:
        yield lambda bundle: stack.enter_context(serving(bundle, tmp_path))


@pytest.fixture(scope="session")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on the bundle."""
    with serving(bundle, tmp_path_factory.mktemp("serve")) as address:
        yield address


@pytest.fixture
def guarded_server(bundle: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a server that asks for the token "sesame"."""
    with serving(bundle, tmp_path, REPTILE_TOKEN="sesame") as address:
        yield address


@pytest.fixture(scope="session")
def colour_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on a bundle for colour images, not trained at all."""
    folder = tmp_path_factory.mktemp("colour")
    shape = (3, 12, 12)
    checkpoint = make_checkpoint(ModelSettings(filters=8), shape)
    write_bundle(folder / "bundle", make_data(shape), checkpoint)
    with serving(folder / "bundle", folder) as address:
        yield address


@pytest.fixture(scope="session")
def closed_form_server(
    closed_form_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a server on a closed-form bundle, not trained at all."""
    with serving(closed_form_bundle, tmp_path_factory.mktemp("closed-form-server")) as address:
        yield address


@pytest.fixture(scope="session")
def playwright() -> Iterator[Any]:
    """What starts browsers."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="session")
def chromium(playwright: Any) -> Iterator[Any]:
    """A headless Chromium."""
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture
def chromium_with_webgpu(playwright: Any) -> Iterator[Any]:
    """A headless Chromium whose WebGPU runs on the CPU, if it offers any."""
    flags = [flag for flag in FLAGS if flag != "--disable-gpu"]
    flags += ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
    flags += ["--enable-features=Vulkan", "--ignore-gpu-blocklist"]
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
    yield browser
    browser.close()


@pytest.fixture
def open_page(chromium: Any, server: str) -> Iterator[Callable[..., Any]]:
    """Open the page, or another address, in a fresh profile.

    Console errors, uncaught exceptions, and requests to other origins fail the test at its end;
    `allowed` is a pattern of what a console error may say.
    """
    contexts, problems = [], []

    def opener(address: str = server, *, allowed: str = "", **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1180, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()

        def console(message: Any) -> None:
            text = f"{message.text} {message.location['url']}"
            if message.type in ("error", "warning") and not (allowed and re.search(allowed, text)):
                problems.append(f"{message.type}: {text}")

        page.on("console", console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(address)
                else problems.append(f"asks for {request.url}")
            ),
        )
        page.goto(address)
        return page

    yield opener
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="session")
def node() -> Callable[..., Any]:
    """Run an ES module in Node from the project's root: JSON in on stdin, JSON out on stdout."""

    def run(script: str, value: Any = None, folder: Path = ROOT) -> Any:
        done = subprocess.run(
            ["node", "--input-type=module", "--eval", script],
            input=json.dumps(value),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
