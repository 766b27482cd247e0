"""The npm package of clients/js: its files, what the wheel holds of it, and two bundlers on it."""

import functools
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import reptile
from reptile.images import decode, fit
from reptile.runtime import FewShotModel

MAIN = """
import { BackgroundModel } from "reptile-fewshot/background.js";
import { pixelsOfFile } from "reptile-fewshot/pictures.js";
globalThis.classify = async (images, labels, png) => {
  const model = await BackgroundModel.load("/bundle/", "/ort/ort.wasm.bundle.min.mjs");
  const task = await model.adapt(images, labels, { seed: 3, steps: 10 });
  const file = new File([Uint8Array.from(png)], "query.png");
  const { probabilities } = await task.predict([await pixelsOfFile(file, model.imageShape)]);
  await pixelsOfFile(new File(["no image"], "notes.txt"), model.imageShape).catch((error) => {
    globalThis.refused = `${error.name}: ${error.message}`;
  });
  return [...probabilities[0]];
};
"""
BUNDLERS = {
    "webpack": """
        import webpack from "webpack";
        const [site] = JSON.parse(readFileSync(0));
        const settings = { mode: "production", context: site, entry: "./main.js" };
        webpack({ ...settings, output: { path: `${site}/dist` } }, (error, stats) => {
          const { errors, warnings } = stats?.toJson() ?? { errors: [error], warnings: [] };
          console.log(JSON.stringify([...errors, ...warnings].map(({ message }) => message)));
        });
    """,
    "vite": """
        import { build } from "vite";
        const [site] = JSON.parse(readFileSync(0));
        const said = [];
        const say = (text) => { said.push(text); };
        const customLogger = { info() {}, warn: say, warnOnce: say, error: say };
        Object.assign(customLogger, { clearScreen() {}, hasErrorLogged: () => false });
        await build({ root: site, configFile: false, logLevel: "warn", customLogger });
        console.log(JSON.stringify(said));
    """,
}
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


def modules(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.js")}


def test_its_version_is_that_of_the_python_package(root: Path) -> None:
    assert json.loads((root / "clients/js/package.json").read_text())["version"] == (
        reptile.__version__
    )


def test_the_paths_of_before_lead_to_the_same_modules(root: Path) -> None:
    page = root / "reptile/serve/page"
    for name in ("background", "fewshot", "golden", "pictures", "pixels", "service"):
        assert f'export * from "./client/{name}.js";' in (page / f"{name}.js").read_text()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package was packed and unpacked, as npm installs it."""
    folder = tmp_path_factory.mktemp("packed")
    command = ["npm", "pack", "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
    source = Path(__file__).parents[2] / "clients/js"
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


@needs_npm
def test_the_package_holds_every_module_that_it_exports(packed: Path, root: Path) -> None:
    assert modules(packed) == modules(root / "clients/js")
    names = {path.name for path in packed.iterdir()} - modules(packed)
    assert names == {"LICENSE", "README.md", "package.json"}
    for path in json.loads((packed / "package.json").read_text())["exports"].values():
        assert (packed / path).is_file()
    for module in packed.glob("*.js"):
        for imported in re.findall(r'from "(.*)";$', module.read_text(), re.MULTILINE):
            if imported.startswith("."):
                assert (packed / imported).is_file(), (module, imported)


def test_the_wheel_holds_the_page_the_package_and_the_schemas(root: Path, tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "pyproject.toml", "README.md", "LICENSE", "reptile"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():  # no more than what the images are built from
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp_path / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(tmp_path / "source")],
        capture_output=True,
        check=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        folders = ("reptile/serve/page/", "reptile/schemas/")
        held = {name for name in wheel.namelist() if name.startswith(folders)}
    page = root / "reptile/serve/page"
    on_disk = {
        str(path.relative_to(root))
        for folder in (page, page / "client", root / "reptile/schemas")
        for path in folder.iterdir()
        if path.is_file()
    }
    assert held == on_disk


@pytest.fixture
def built(
    request: pytest.FixtureRequest,
    node: Callable[..., Any],
    packed: Path,
    bundle: Path,
    root: Path,
    tmp_path: Path,
) -> Iterator[str]:
    """The address of a site whose script a bundler made of the package."""
    site = tmp_path / "site"
    shutil.copytree(packed, site / "node_modules/reptile-fewshot")
    (site / "package.json").write_text('{"private": true, "type": "module"}')
    (site / "main.js").write_text(MAIN)
    (site / "index.html").write_text('<script type="module" src="/main.js"></script>')
    said = node(
        'import { readFileSync } from "node:fs";' + BUNDLERS[request.param], [str(site)], root
    )
    assert said == [], "no errors, no warnings"
    if request.param == "webpack":
        shutil.copy(site / "index.html", site / "dist/index.html")
    shutil.copytree(bundle, site / "dist/bundle")
    shutil.copytree(root / "reptile/serve/ort", site / "dist/ort")

    class QuietHandler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler = functools.partial(QuietHandler, directory=site / "dist")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()
        thread.join()


@pytest.mark.browser
@needs_npm
@pytest.mark.parametrize("built", BUNDLERS, indirect=True)
def test_a_bundled_page_gives_what_python_gives(
    built: str, open_page: Callable[..., Any], bundle: Path
) -> None:
    model = FewShotModel.load(bundle)
    images = np.random.default_rng(1).integers(0, 256, (9, *model.image_shape), dtype=np.uint8)
    labels = ["a", "b", "c"] * 3
    file = io.BytesIO()
    Image.fromarray(np.kron(images[0, 0] // 2, np.ones((3, 2), np.uint8))).save(file, "PNG")
    query = fit(decode("query.png", file.getvalue()), model.pixel_shape)
    page = open_page(built, allowed="favicon")
    found = page.evaluate(
        "(values) => classify(...values)",
        [images.reshape(9, -1).tolist(), labels, list(file.getvalue())],
    )
    expected = model.adapt(images, labels, seed=3, steps=10).predict(query[None]).probabilities[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert page.evaluate("refused").startswith("InputError: notes.txt cannot be read")
