"""Verification passes on a sound bundle, and every kind of fault makes it fail."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.export.graphs import describe
from reptile.export.verify import parity as module
from reptile.export.verify import verify_bundle
from reptile.export.verify.conformance import Check
from reptile.files import sha256_file
from reptile.learn.checkpoint import Checkpoint
from reptile.settings import VerifySettings

SETTINGS = VerifySettings(tasks=30, steps=5)
Edit = Callable[[onnx.GraphProto], None]


@pytest.fixture
def failures(
    bundle: Path, checkpoint: Checkpoint, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Verify the bundle, by some groups of checks or by all; return what failed."""

    def verify(*groups: str) -> list[str]:
        if groups:
            chosen = tuple(getattr(module, group) for group in groups)
            monkeypatch.setattr(module, "GROUPS", chosen)
        report = verify_bundle(SETTINGS, bundle, checkpoint, data)
        failed = [check["name"] for check in report["checks"] if not check["passed"]]
        assert report["passed"] == (not failed)
        json.dumps(report, allow_nan=False)
        return failed

    return verify


def rewrite(bundle: Path, graph: str, edit: Edit) -> None:
    """Change a graph and make the hashes right again: a fault of the exporter, not of the disk."""
    path = bundle / f"{graph}/1/model.onnx"
    model = onnx.load(path)
    edit(model.graph)
    path.write_bytes(model.SerializeToString(deterministic=True))
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = sha256_file(bundle / name)
    manifest["graphs"][graph]["inputs"] = describe(model.graph.input)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def constant(name: str, change: Callable[[Any], Any]) -> Edit:
    def edit(graph: onnx.GraphProto) -> None:
        (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
        value = change(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))

    return edit


def bake_images(graph: onnx.GraphProto) -> None:
    """Replace what is computed from the support set by what one support set gave."""
    (node,) = (
        node for node in graph.node if "support_images" in node.input and node.op_type == "Div"
    )
    images = np.full((25, 1, 12, 12), 0.5, dtype=np.float32)
    images[::2, :, 3:7] = 1
    for other in (*graph.node, *loop(graph).node):
        for index, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[index] = "baked"
    graph.initializer.append(numpy_helper.from_array(images, "baked"))


def loop(graph: onnx.GraphProto) -> onnx.GraphProto:
    (body,) = (node.attribute[0].g for node in graph.node if node.op_type == "Loop")
    return body


def unclamp(graph: onnx.GraphProto) -> None:
    (clip,) = (n for n in graph.node if n.op_type == "Clip" and n.input[0] == "support_labels")
    clip.op_type = "Identity"
    del clip.input[1:]


def swap_halves(value: Any) -> Any:
    return np.roll(value, len(value) // 2)


FAULTS: dict[str, tuple[str, Edit, str, str]] = {
    "epsilon of 1e-3": (
        "adapt",
        constant("epsilon", lambda value: value * 1e5),
        "adapt: Adam's epsilon is there",
        "conformance",
    ),
    "epsilon folded to a scalar zero": (
        "few_shot",
        constant("epsilon", lambda value: value * 0),
        "few_shot: Adam's epsilon is there",
        "conformance",
    ),
    "weights in another order": (
        "adapt",
        constant("initial_weights", swap_halves),
        "adapt equals eager PyTorch",
        "_adapt",
    ),
    "one weight off": (
        "predict",
        constant("head.weight", lambda value: value + 1e-2 * np.eye(*value.shape)),
        "predict equals eager PyTorch",
        "_prediction",
    ),
    "a second moment one per cent off": (
        "adapt",
        constant("second_moment", lambda value: value * 0.99),
        "adapt equals eager PyTorch",
        "_adapt",
    ),
    "the support set baked in": (
        "adapt",
        bake_images,
        "adapt depends on every input",
        "_adapt_depends",
    ),
    "labels not clamped": (
        "adapt",
        unclamp,
        "adapt guards",
        "_adapt_guards",
    ),
    "another second moment in few_shot": (
        "few_shot",
        constant("second_moment", lambda value: value * 0.5),
        "few_shot equals adapt and predict_adapted",
        "_prediction",
    ),
}


def test_a_sound_bundle_passes(failures: Callable[..., list[str]]) -> None:
    assert failures() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_graph_fails(fault: str, bundle: Path, failures: Callable[..., list[str]]) -> None:
    graph, edit, expected, group = FAULTS[fault]
    rewrite(bundle, graph, edit)
    failed = failures(group)
    assert any(name.startswith(expected) for name in failed), failed


def test_damage_leaks_and_foreign_operators_fail(
    bundle: Path, failures: Callable[..., list[str]]
) -> None:
    def describe_node(graph: onnx.GraphProto) -> None:
        graph.node[0].doc_string = f'File "{Path.home()}/model.py", line 3'

    def leave_the_standard(graph: onnx.GraphProto) -> None:
        (relu,) = [node for node in graph.node if node.op_type == "Relu"][:1]
        relu.domain = "com.example"

    rewrite(bundle, "adapt", describe_node)
    rewrite(bundle, "predict", leave_the_standard)
    with (bundle / "MODEL_CARD.md").open("a") as card:
        card.write("x")
    (bundle / "stray.bin").write_bytes(b"x")
    failed = failures("conformance", "runtime")
    assert "files match their SHA-256" in failed
    assert "adapt: no descriptions or paths" in failed
    assert "predict: opset 18, no other domain" in failed
    assert "runtime can be checked" in failed


def test_golden_tensors_without_a_refused_input_fail(
    bundle: Path, failures: Callable[[str], list[str]]
) -> None:
    path = bundle / "golden/golden.json"
    cases = json.loads(path.read_text())["cases"]
    path.write_text(json.dumps({"cases": [c for c in cases if "refused" not in str(c)]}))
    assert failures("golden") == ["golden tensors hold a refused input"]


def test_a_golden_tensor_that_is_off_fails(
    bundle: Path, failures: Callable[..., list[str]]
) -> None:
    path = bundle / "golden/adapt-5/losses.npy"
    np.save(path, np.load(path) * np.float32(1.001))
    assert "golden tensors are reproduced" in failures("golden")


def test_another_checkpoint_fails(
    bundle: Path, checkpoint: Checkpoint, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = checkpoint.meta.inner._replace(step=checkpoint.meta.inner.step // 2)
    other = checkpoint._replace(state=checkpoint.meta._replace(inner=inner))
    monkeypatch.setattr(module, "GROUPS", (module._adapt,))
    assert not verify_bundle(SETTINGS, bundle, other, data)["passed"]


def test_numbers_that_are_none_fail_and_can_still_be_written() -> None:
    for measured in (float("nan"), float("inf")):
        check = Check.at_most("x", measured, 1)
        assert not check.passed
        assert json.dumps(check, allow_nan=False) == '["x", false, null, 1.0, ""]'


def test_no_bundle_is_an_input_error(
    tmp_path: Path, checkpoint: Checkpoint, data: PreparedData
) -> None:
    with pytest.raises(InputError, match="run `reptile export` first"):
        verify_bundle(SETTINGS, tmp_path, checkpoint, data)
