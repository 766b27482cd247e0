"""Closed-form bundles in Node, in Chromium on WebAssembly and WebGPU, and on the page."""

import functools
import http.server
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reptile.data.dataset import PreparedData
from reptile.runtime import FewShotModel

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed"),
]

TASK = """
const model = await FewShotModel.load(BUNDLE, ort, OPTIONS);
const cases = await checkGolden(BUNDLE, backend);
const first = await model.adapt(input.images.slice(0, 4), input.labels.slice(0, 4));
const grown = await first.add(input.images.slice(4), input.labels.slice(4));
const shrunk = await grown.remove("b");
const tasks = { first, grown, shrunk };
const result = { folders: cases.map(({ graph }) => graph) };
for (const [name, task] of Object.entries(tasks)) {
  const { labels, probabilities } = await task.predict(input.queries);
  result[name] = [task.labels, labels, probabilities.map((row) => [...row])];
}
result.refused = await model.adapt(input.images, input.labels, { steps: 3 }).catch(String);
"""


@pytest.fixture(scope="module")
def task(data: PreparedData) -> dict[str, Any]:
    starts = data.split("test").starts[:3]
    images = np.concatenate([data.images[start : start + 2] for start in starts])
    queries = np.stack([data.images[start + 5] for start in starts])
    return {
        "images": images.reshape(6, -1).tolist(),
        "labels": ["a", "a", "b", "b", "c", "c"],
        "queries": queries.reshape(3, -1).tolist(),
    }


def check(found: dict[str, Any], bundle: Path, task: dict[str, Any]) -> None:
    """Hold the tasks to those of the Python runtime."""
    model = FewShotModel.load(bundle)
    images, queries = (
        np.array(task[name], np.uint8).reshape(-1, *model.image_shape)
        for name in ("images", "queries")
    )
    labels = task["labels"]
    kept = [0, 1, 4, 5]
    expected = {
        "first": model.adapt(images[:4], labels[:4]),
        "grown": model.adapt(images, labels),
        "shrunk": model.adapt(images[kept], [labels[place] for place in kept]),
    }
    for name, adapted in expected.items():
        names, answers, probabilities = found[name]
        wanted = adapted.predict(queries)
        assert names == adapted.labels
        assert answers == wanted.labels
        np.testing.assert_allclose(probabilities, wanted.probabilities, rtol=0, atol=1e-4)
    assert set(found["folders"]) == {"embed", "fit", "adapt", "predict_adapted", "few_shot"}
    assert "leave out steps" in found["refused"]


def test_node_gives_what_python_gives(
    node: Callable[..., Any], root: Path, closed_form_bundle: Path, task: dict[str, Any]
) -> None:
    script = f"""
    import {{ readFileSync }} from "node:fs";
    import {{ readFile }} from "node:fs/promises";
    import ort from "onnxruntime-node";
    import {{ FewShotModel }} from "reptile-fewshot";
    import {{ checkGolden }} from "reptile-fewshot/golden.js";
    const input = JSON.parse(readFileSync(0));
    const read = (path) => readFile("{closed_form_bundle}/" + path);
    const backend = ort;
    {TASK.replace("BUNDLE", "read").replace("OPTIONS", "{}")}
    console.log(JSON.stringify(result));
    """
    check(node(script, task, root / "clients/node"), closed_form_bundle, task)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site(root: Path, closed_form_bundle: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a site with the module, the bundle and onnxruntime-web."""
    runtime = root / "node_modules/onnxruntime-web/dist"
    if not runtime.is_dir():
        pytest.skip("onnxruntime-web is not installed: npm ci --ignore-scripts")
    for name, folder in (
        ("fewshot", root / "clients/js"),
        ("bundle", closed_form_bundle),
        ("ort", runtime),
    ):
        (tmp_path / name).symlink_to(folder.resolve())
    (tmp_path / "index.html").write_text("<!doctype html><title>test</title>")
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("provider", ["wasm", "webgpu"])
def test_chromium_gives_what_python_gives(
    chromium_with_webgpu: Any,
    site: str,
    closed_form_bundle: Path,
    task: dict[str, Any],
    provider: str,
) -> None:
    script = f"""async ([input, provider]) => {{
      if (provider === "webgpu" && !(await navigator.gpu?.requestAdapter())) return null;
      const ort = await import(`/ort/ort.${{provider}}.bundle.min.mjs`);
      const {{ FewShotModel }} = await import("/fewshot/fewshot.js");
      const {{ checkGolden }} = await import("/fewshot/golden.js");
      ort.env.wasm.numThreads = 1;
      const options = {{ executionProviders: [provider] }};
      const create = (content) => ort.InferenceSession.create(content, options);
      const backend = {{ Tensor: ort.Tensor, InferenceSession: {{ create }} }};
      {TASK.replace("BUNDLE", '"/bundle/"').replace("OPTIONS", "options")}
      return result;
    }}"""
    page = chromium_with_webgpu.new_page()
    page.goto(site)
    found = page.evaluate(script, [task, provider])
    if found is None:
        pytest.skip("this Chromium offers no WebGPU adapter")
    check(found, closed_form_bundle, task)


def test_the_page_speaks_of_no_steps(
    open_page: Callable[..., Any], closed_form_server: str
) -> None:
    page = open_page(closed_form_server)
    page.locator("#about", has_text="up to 50 symbols").wait_for()
    assert "steps" not in page.locator("#about").inner_text()
    for i in range(2):
        box = page.locator(".symbol .pad").nth(i).bounding_box()
        page.mouse.move(box["x"] + 20, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 60 + 40 * i, box["y"] + 90 - 60 * i, steps=5)
        page.mouse.up()
    for where in ("server", "browser"):
        page.locator(f"[name=where][value={where}]").check(force=True)
        page.locator("#learn").click()
        page.locator("#status", has_text="Learnt from 2 examples").wait_for(timeout=60_000)
        assert page.locator("#curve").is_hidden()
        assert page.locator("#probabilities li").count() == 2
