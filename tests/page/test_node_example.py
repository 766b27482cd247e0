"""The bundle in Node: the example as its README says, and what the module refuses."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reptile.runtime import FewShotModel

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed"),
]

RUN = """
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import ort from "onnxruntime-node";
import { FewShotModel } from "reptile-fewshot";
import { checkGolden } from "reptile-fewshot/golden.js";
const input = JSON.parse(readFileSync(0));
const bundle = (path) => readFile(`${input.bundle}/${path}`);
const print = (value) => console.log(JSON.stringify(value));
"""

TWO = ("[dark, light]", '["a", "b"]')
REFUSED = [  # images, labels, options, and what is said of them
    ("[dark, light, dark]", '["a", "b"]', "{}", "3 images but 2 labels"),
    ("[]", "[]", "{}", "has 0 images"),
    ("[dark, light.slice(1)]", '["a", "b"]', "{}", "image 1 has"),
    ("[dark, light.map(() => NaN)]", '["a", "b"]', "{}", "holds the pixel NaN"),
    ("[dark, light.map(() => 256)]", '["a", "b"]', "{}", "0..255"),
    ("[dark.map(() => 0.1), light.map(() => 1)]", '["a", "b"]', "{}", "multiply by 255"),
    ("[dark, light]", '["a", "a"]', "{}", "nothing to tell apart"),
    ("[dark, light]", '["a", NaN]', "{}", "missing or NaN"),
    ("many.map(() => dark)", "many", "{}", "ways"),
    (*TWO, "{ steps: -1 }", "steps must be an integer"),
    (*TWO, "{ seed: 0.5 }", "seed must be an integer"),
    (*TWO, "{ learningRate: 0 }", "above 0"),
    (*TWO, "{ batches: [[0, 2]] }", "0..1, got 2"),
    (*TWO, "{ batches: [[0], [0, 1]] }", "the same number"),
    (*TWO, "{ batches: [[0]], steps: 1 }", "either steps or"),
]

Node = Callable[..., Any]


@pytest.fixture
def example(root: Path) -> Path:
    return root / "clients/node"


def test_the_example_checks_the_golden_tensors_and_adapts_to_a_task(
    example: Path, bundle: Path
) -> None:
    command = ["node", "main.js", str(bundle.resolve())]
    assert command[:2] == (example / "README.md").read_text().split("    ")[2].split()[:2]
    done = subprocess.run(command, cwd=example, capture_output=True, text=True, check=True)
    cases = json.loads((bundle / "golden/golden.json").read_text())["cases"]
    assert done.stdout.count("golden") == len(cases)
    assert [case for case in cases if [*case["outputs"]] == ["finite"]]  # refused, by the graph
    for name in ("corner", "zigzag", "dash"):
        assert f"a new {name} is classified as {name}" in done.stdout


def test_node_gives_what_python_gives_for_the_same_arguments(
    node: Node, example: Path, bundle: Path
) -> None:
    model = FewShotModel.load(bundle)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, *model.image_shape), dtype=np.uint8)
    labels = ["b", "a", "c", "a", "b", "a", "c", "b"]
    settings = {"steps": 7, "seed": 5}
    found = node(
        RUN
        + """
        const model = await FewShotModel.load(bundle, ort);
        const task = await model.adapt(input.images, input.labels, input.settings);
        const { labels, probabilities } = await task.predict(input.images);
        print([task.labels, [...task.losses], labels, probabilities.map((row) => [...row])]);
        """,
        {
            "bundle": str(bundle.resolve()),
            "images": images.reshape(8, -1).tolist(),
            "labels": labels,
            "settings": settings,
        },
        example,
    )
    task = model.adapt(images, labels, **settings)
    prediction = task.predict(images)
    assert found[0] == task.labels
    assert found[2] == prediction.labels
    np.testing.assert_allclose(found[1], task.losses, atol=1e-4)
    np.testing.assert_allclose(found[3], prediction.probabilities, atol=1e-4)


def test_what_cannot_be_used_is_refused_with_its_reason(
    node: Node, example: Path, bundle: Path
) -> None:
    calls = ",".join(
        f"() => model.adapt({images}, {labels}, {options})"
        for images, labels, options, _ in REFUSED
    )
    answers = node(
        RUN
        + f"""
        const model = await FewShotModel.load(bundle, ort);
        const size = model.imageShape.reduce((product, n) => product * n);
        const dark = new Array(size).fill(3);
        const light = dark.map((_, i) => i % 2 ? 255 : 200);
        const many = Array.from({{ length: model.ways + 1 }}, (_, i) => i);
        const answers = [];
        for (const call of [{calls}]) {{
          await call().then(
            () => answers.push(["accepted", ""]),
            (error) => answers.push([error.name, error.message]),
          );
        }}
        print(answers);
        """,
        {"bundle": str(bundle.resolve())},
        example,
    )
    for (name, message), (*call, reason) in zip(answers, REFUSED, strict=True):
        assert name == "InputError", (call, message)
        assert reason in message, call


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("adapt/1/model.onnx", lambda content: content[:-1], "does not match its SHA-256"),
        ("manifest.json", lambda content: content[:-20], "is not JSON"),
        ("manifest.json", lambda content: b"{}", "format undefined"),
    ],
)
def test_a_damaged_bundle_is_not_opened(
    node: Node,
    example: Path,
    bundle: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes],
    reason: str,
) -> None:
    damaged = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (damaged / name).write_bytes(change((damaged / name).read_bytes()))
    kind, message = node(
        RUN
        + """
        await FewShotModel.load(bundle, ort).catch((error) => print([error.name, error.message]));
        """,
        {"bundle": str(damaged)},
        example,
    )
    assert kind == "InputError"
    assert reason in message


def test_golden_tensors_that_are_off_are_found(
    node: Node, example: Path, bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    golden = json.loads((copy / "golden/golden.json").read_text())
    expected = copy / "golden" / golden["cases"][0]["outputs"]["logits"]
    np.save(expected, np.load(expected) + np.float32(0.01))
    message = node(
        RUN
        + """
        const { createHash } = await import("node:crypto");
        const read = async (path) => {
          const content = await bundle(path);
          if (path !== "manifest.json") return content;
          const manifest = JSON.parse(content);
          for (const name of Object.keys(manifest.files)) {
            const hash = createHash("sha256").update(await bundle(name));
            manifest.files[name] = hash.digest("hex");
          }
          return Buffer.from(JSON.stringify(manifest));
        };
        await checkGolden(read, ort).catch((error) => print(error.message));
        """,
        {"bundle": str(copy)},
        example,
    )
    assert "does not compute what was exported" in message
