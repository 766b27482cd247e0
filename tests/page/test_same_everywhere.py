"""One task in Python, over HTTP, in Node and in Chromium; and an app's own page of plain files."""

import functools
import http.server
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

from reptile.runtime.bundle import open_bundle
from reptile.runtime.provider import open_session

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed"),
]

TYPES = {"float32": "FP32", "int64": "INT64"}


def test_the_golden_tasks_get_the_same_logits_in_python_over_http_in_node_and_in_chromium(
    bundle: Path, server: str, node: Callable[..., Any], open_page: Callable[..., Any], root: Path
) -> None:
    opened = open_bundle(bundle)
    session = open_session(opened.read(opened.graphs["few_shot"].path), "few_shot")
    in_python, over_http, folders = [], [], []
    for case in json.loads(opened.read("golden/golden.json"))["cases"]:
        if case["graph"] != "few_shot":
            continue
        feeds = {n: np.load(bundle / "golden" / path) for n, path in case["inputs"].items()}
        in_python.append(session.run(["logits"], feeds)[0].ravel())
        over_http.append(infer(server, feeds))
        folders.append(case["outputs"]["logits"].split("/")[0])

    golden = "golden.checkGolden(bundle, ort)"
    in_node = node(
        f"""
        import {{ readFile }} from "node:fs/promises";
        import ort from "onnxruntime-node";
        import * as golden from "reptile-fewshot/golden.js";
        const bundle = (path) => readFile("{bundle.resolve()}/" + path);
        console.log(JSON.stringify(await {golden}));
        """,
        folder=root / "clients/node",
    )
    in_chromium = open_page().evaluate(
        f"""async () => {{
          const ort = await import("/ort/ort.wasm.bundle.min.mjs");
          const golden = await import("/page/client/golden.js");
          const bundle = "/bundle/";
          return {golden};
        }}"""
    )
    for found in (in_node, in_chromium):
        few_shot = [case for case in found if case["graph"] == "few_shot"]
        assert [case["folder"] for case in few_shot] == folders
        for case, expected in zip(few_shot, in_python, strict=True):
            np.testing.assert_allclose(case["logits"], expected, rtol=0, atol=1e-4)
    for found, expected in zip(over_http, in_python, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert len(in_python) >= 3


def infer(server: str, feeds: dict[str, np.ndarray]) -> list[float]:
    inputs = [
        {
            "name": name,
            "shape": list(value.shape),
            "datatype": TYPES[str(value.dtype)],
            "data": value.ravel().tolist(),
        }
        for name, value in feeds.items()
    ]
    body = json.dumps({"inputs": inputs, "outputs": [{"name": "logits"}]}).encode()
    request = Request(
        f"{server}v2/models/few_shot/infer", body, {"Content-Type": "application/json"}
    )
    with urlopen(request) as answer:
        (logits,) = json.load(answer)["outputs"]
    return list(logits["data"])


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def own_site(root: Path, bundle: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The page of docs/browser.md on a site of plain files: its folder and its address."""
    site = tmp_path / "site"
    site.mkdir()
    example = re.search(
        r"^```html\n(.*?)^```", (root / "docs/browser.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert example
    (site / "index.html").write_text(example[1])
    for name, folder in (
        ("fewshot", root / "clients/js"),
        ("page", root / "reptile/serve/page"),  # the paths of before
        ("ort", root / "reptile/serve/ort"),
        ("bundle", bundle),
    ):
        shutil.copytree(folder, site / name)
    handler = functools.partial(QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield site, f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()
        thread.join()


def test_the_documented_page_learns_on_a_site_of_plain_files(
    open_page: Callable[..., Any], own_site: tuple[Path, str], tmp_path: Path
) -> None:
    pictures: dict[str, list[Path]] = {"cat": [], "dog": []}
    for name, paths in pictures.items():
        for i in range(4):
            bars = np.full((60, 60), 255, np.uint8)
            for top in (10 + i, 38 + i):
                bars[top : top + 6, 8:52] = 0
            image = Image.fromarray(bars if name == "cat" else bars.T)
            paths.append(tmp_path / f"{name}{i}.png")
            image.save(paths[-1])
    page = open_page(own_site[1], allowed="favicon")
    for name, paths in pictures.items():
        page.locator(f"[name={name}]").set_input_files(paths[:3])
    for name, paths in pictures.items():
        page.locator("#query").set_input_files(paths[3])
        page.locator("output", has_text=name).wait_for()


def test_a_page_from_plain_http_checks_the_files_too(
    open_page: Callable[..., Any], own_site: tuple[Path, str]
) -> None:
    site, address = own_site
    page = open_page(address.replace("127.0.0.1", "plain.test"), allowed="favicon|integrity")
    load = """async (bundle) => {
      const { BackgroundModel } = await import("/page/background.js");
      try {
        await BackgroundModel.load(bundle, "/ort/ort.wasm.bundle.min.mjs");
        return "loaded";
      } catch (error) {
        return `${error.name}: ${error.message}`;
      }
    }"""
    assert page.evaluate("crypto.subtle === undefined"), "or else this tests nothing"
    assert page.evaluate(load, "/bundle/") == "loaded"
    graph = Path(shutil.copytree(site / "bundle", site / "damaged")) / "adapt/1/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    said = page.evaluate(load, "/damaged/")
    assert said.startswith("InputError")
    assert "does not match its SHA-256" in said
