"""The JavaScript module reads the manifests that Python reads, and refuses those it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from schemas import CLOSED_FORM, DISAGREEMENTS, MANIFEST, spoil

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")

READ = """
import { readFileSync } from "node:fs";
import { openBundle } from "./reptile/serve/page/client/fewshot.js";
const answers = [];
for (const manifest of JSON.parse(readFileSync(0))) {
  const bytes = new TextEncoder().encode(JSON.stringify(manifest));
  await openBundle(async () => bytes).then(
    (files) => answers.push(["read", JSON.stringify(files.manifest) === JSON.stringify(manifest)]),
    (error) => answers.push([error.name, error.message]),
  );
}
console.log(JSON.stringify(answers));
"""


@pytest.fixture
def manifest(exported: Path) -> Any:
    return json.loads((exported / "manifest.json").read_text())


def test_it_reads_every_format(
    node: Callable[..., Any], manifest: Any, closed_form_bundle: Path
) -> None:
    closed_form = json.loads((closed_form_bundle / "manifest.json").read_text())
    metrics = {"patterns": {"1-shot": {"frozen": {"accuracy": 0.75, "interval": 0.01}}}}
    first = manifest | {"format": 1, "metrics": metrics}
    del first["learner"]
    kindless = spoil(first, "task", {**first["task"]})
    del kindless["task"]["kind"]
    assert node(READ, [manifest, first, kindless, closed_form]) == [["read", True]] * 4


def test_it_refuses_what_the_schema_or_python_refuses(
    node: Callable[..., Any], manifest: Any
) -> None:
    spoiled = MANIFEST + DISAGREEMENTS
    answers = node(READ, [spoil(manifest, path, value) for _, path, value in spoiled])
    for (name, message), (title, *_) in zip(answers, spoiled, strict=True):
        assert name == "InputError", (title, message)
        assert message.startswith("manifest.json"), (title, message)


def test_it_refuses_a_closed_form_manifest_that_the_schema_refuses(
    node: Callable[..., Any], closed_form_bundle: Path
) -> None:
    manifest = json.loads((closed_form_bundle / "manifest.json").read_text())
    answers = node(READ, [spoil(manifest, path, value) for _, path, value in CLOSED_FORM])
    for (name, message), (title, *_) in zip(answers, CLOSED_FORM, strict=True):
        assert name == "InputError", (title, message)
        assert message.startswith("manifest.json"), (title, message)


def test_a_classifiers_manifest_is_no_regressors(node: Callable[..., Any], manifest: Any) -> None:
    regressor = spoil(manifest, "task/kind", "regression")
    ((name, message),) = node(READ, [regressor])
    assert (name, "not that of a bundle" in message) == ("InputError", True)
