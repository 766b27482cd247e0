"""Closed-form bundles: their graphs, their verification, and the faults that it finds."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from bundles import make_closed_form_checkpoint
from onnx import numpy_helper
from torch import nn

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.export.closed_form import build_closed_form_graphs, newton_schulz
from reptile.export.verify import closed_form as module
from reptile.export.verify import verify_bundle
from reptile.export.write import export_bundle
from reptile.files import sha256_file
from reptile.learn.checkpoint import Checkpoint
from reptile.settings import EvaluateSettings, ExportSettings, VerifySettings

SETTINGS = VerifySettings(tasks=30)


def kernel(size: int, features: int, strength: float, seed: int = 0) -> np.ndarray:
    """Ridge's matrix of ReLU features with a class structure, in float64."""
    rng = np.random.default_rng(seed)
    means = rng.normal(0.2, 1, (5, features))[np.arange(size) % 5]
    x = np.maximum(means + 0.1 * rng.normal(size=(size, features)), 0).astype(np.float32)
    return x.astype(np.float64) @ x.T + 1 + strength * np.eye(size)


@pytest.mark.parametrize("size", [1, 2, 25, 100, 500])
@pytest.mark.parametrize("strength", [1e-2, 1.0, 100.0])
def test_products_alone_solve_as_well_as_a_factorisation(size: int, strength: float) -> None:
    matrix = kernel(size, 64, strength)
    right = np.eye(5)[np.arange(size) % 5]
    wanted = np.linalg.solve(matrix, right)
    condition = np.linalg.cond(matrix)
    single = torch.from_numpy(matrix.astype(np.float32)), torch.from_numpy(right).float()
    found, lapack = newton_schulz(*single).numpy(), torch.linalg.solve(*single).numpy()
    scale = np.abs(wanted).max()
    off, usual = (np.abs(each - wanted).max() / scale for each in (found, lapack))
    assert off <= 10 * usual + 1e-5, f"condition {condition:.1e}"


def test_a_matrix_beyond_float32_gives_finite_numbers() -> None:
    matrix = torch.from_numpy(kernel(200, 16, 1e-9)).float()
    assert newton_schulz(matrix, torch.eye(200)).isfinite().all()


def test_the_graphs_have_standard_operators_and_no_control_flow(closed_form_bundle: Path) -> None:
    manifest = json.loads((closed_form_bundle / "manifest.json").read_text())
    assert list(manifest["graphs"]) == ["embed", "fit", "adapt", "predict_adapted", "few_shot"]
    operators: Counter[str] = Counter()
    for graph in manifest["graphs"].values():
        found = onnx.load(closed_form_bundle / graph["path"]).graph
        operators += Counter(node.op_type for node in found.node)
    assert not operators.keys() & {"Loop", "If", "Scan", "BatchNormalization", "Pad"}
    embed = onnx.load(closed_form_bundle / "embed/1/model.onnx").graph
    assert [node.op_type for node in embed.node] == ["Div", *["Conv", "Relu"] * 4, "Reshape"]


def test_the_prototypes_are_the_means_and_absent_labels_are_masked(data: PreparedData) -> None:
    checkpoint = make_closed_form_checkpoint(data, "protonet")
    graphs = build_closed_form_graphs(checkpoint, 50)
    features = np.random.default_rng(0).random((6, checkpoint.model.feature_size), np.float32)
    labels = np.array([3, 0, 3, 1, 1, 3])
    session = ort.InferenceSession(graphs["fit"].SerializeToString())
    weight, bias, finite = session.run(None, {"features": features, "support_labels": labels})
    assert finite
    assert weight.shape == (4, features.shape[1])
    for label in (0, 1, 3):
        mean = features[labels == label].mean(0)
        np.testing.assert_allclose(weight[label], 2 * mean, rtol=1e-5)
        np.testing.assert_allclose(bias[label], -(mean**2).sum(), rtol=1e-5)
    assert bias[2] == -1e9


class Plain(nn.Module):
    """A user's module without a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.GELU(),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.BatchNorm2d(6),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_any_module_becomes_a_bundle_that_verifies(data: PreparedData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = make_closed_form_checkpoint(data, "protonet", Plain())
    folder = tmp_path / "bundle"
    export_bundle(ExportSettings(), checkpoint, data, None, folder, protocol=EvaluateSettings())
    report = verify_bundle(SETTINGS, folder, checkpoint, data)
    assert [check["name"] for check in report["checks"] if not check["passed"]] == []
    assert "Plain" in (folder / "MODEL_CARD.md").read_text()
    embed = onnx.load(folder / "embed/1/model.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in embed.node}


def test_more_support_than_ridge_solves_is_refused(
    closed_form_checkpoint: Checkpoint, data: PreparedData, tmp_path: Path
) -> None:
    settings = ExportSettings(max_support=1001)
    with pytest.raises(InputError, match=r"export.max_support = 1001: ridge .* at most 1000"):
        export_bundle(
            settings,
            closed_form_checkpoint,
            data,
            None,
            tmp_path / "b",
            protocol=EvaluateSettings(),
        )


@pytest.fixture
def bundle(closed_form_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be damaged."""
    return Path(shutil.copytree(closed_form_bundle, tmp_path / "bundle"))


@pytest.fixture
def failures(
    bundle: Path,
    closed_form_checkpoint: Checkpoint,
    data: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[str]]:
    """Verify the bundle, by some groups of checks or by all; return what failed."""

    def verify(*groups: str) -> list[str]:
        if groups:
            chosen = tuple(getattr(module, group) for group in groups)
            monkeypatch.setattr(module, "GROUPS", chosen)
        report = verify_bundle(SETTINGS, bundle, closed_form_checkpoint, data)
        failed = [check["name"] for check in report["checks"] if not check["passed"]]
        assert report["passed"] == (not failed)
        return failed

    return verify


def rewrite(bundle: Path, graph: str, edit: Callable[[onnx.GraphProto], None]) -> None:
    """Change a graph and make the hashes right again."""
    path = bundle / f"{graph}/1/model.onnx"
    model = onnx.load(path)
    edit(model.graph)
    path.write_bytes(model.SerializeToString(deterministic=True))
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = sha256_file(bundle / name)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def largest(graph: onnx.GraphProto) -> onnx.TensorProto:
    return max(graph.initializer, key=lambda tensor: np.prod(tensor.dims))


def shift_a_convolution(graph: onnx.GraphProto) -> None:
    tensor = largest(graph)
    value = numpy_helper.to_array(tensor).copy()
    value[0] += 0.05
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def unclamp(graph: onnx.GraphProto) -> None:
    (clip,) = (node for node in graph.node if node.op_type == "Clip")
    clip.op_type = "Identity"
    del clip.input[1:]


def unmask(graph: onnx.GraphProto) -> None:
    (where,) = (node for node in graph.node if node.op_type == "Where")
    kept = where.input[1]
    where.op_type = "Identity"
    del where.input[:]
    where.input.append(kept)


def strengthen(graph: onnx.GraphProto) -> None:
    """Add twice the identity to ridge's matrix."""
    eye = next(node for node in graph.node if node.op_type == "Mul")
    graph.node.insert(
        list(graph.node).index(eye) + 1,
        onnx.helper.make_node("Add", [eye.output[0], eye.output[0]], ["stronger"]),
    )
    for node in list(graph.node):
        if node.output[0] != "stronger":
            node.input[:] = ["stronger" if n == eye.output[0] else n for n in node.input]


def branch(graph: onnx.GraphProto) -> None:
    (node,) = [node for node in graph.node if node.op_type == "Relu"][:1]
    value = onnx.helper.make_tensor_value_info("branch", onnx.TensorProto.FLOAT, None)
    bodies = [
        onnx.helper.make_graph(
            [onnx.helper.make_node("Relu", [node.input[0]], ["branch"])], name, [], [value]
        )
        for name in ("then", "else")
    ]
    graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    node.CopyFrom(
        onnx.helper.make_node(
            "If", ["always"], [node.output[0]], then_branch=bodies[0], else_branch=bodies[1]
        )
    )


FAULTS: dict[str, tuple[str, Callable[[onnx.GraphProto], None], str, str]] = {
    "a convolution off": ("adapt", shift_a_convolution, "adapted logits equal", "_adapt"),
    "a convolution off in embed": ("embed", shift_a_convolution, "embed equals", "_graphs_agree"),
    "a convolution off in few_shot": (
        "few_shot",
        shift_a_convolution,
        "few_shot equals",
        "_graphs_agree",
    ),
    "labels not clamped": ("adapt", unclamp, "adapt guards", "_adapt_guards"),
    "absent labels not masked": ("adapt", unmask, "adapted logits equal", "_adapt"),
    "a branch": ("predict_adapted", branch, "predict_adapted: no control flow", "conformance"),
    "stronger ridge in fit": ("fit", strengthen, "embed and fit equal adapt", "_graphs_agree"),
}


def test_a_sound_bundle_passes(failures: Callable[..., list[str]]) -> None:
    assert failures() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_graph_fails(fault: str, bundle: Path, failures: Callable[..., list[str]]) -> None:
    graph, edit, expected, group = FAULTS[fault]
    rewrite(bundle, graph, edit)
    failed = failures(group)
    assert any(name.startswith(expected) for name in failed), failed


def test_other_statistics_fail(
    bundle: Path,
    closed_form_checkpoint: Checkpoint,
    data: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state: Any = closed_form_checkpoint.state
    (mean, variance), *rest = state.statistics
    other = (type(state.statistics[0])(mean, 1.1 * variance), *rest)
    checkpoint = closed_form_checkpoint._replace(state=state._replace(statistics=other))
    monkeypatch.setattr(module, "GROUPS", (module._adapt,))
    assert not verify_bundle(SETTINGS, bundle, checkpoint, data)["passed"]


def test_the_card_speaks_of_no_steps(closed_form_bundle: Path) -> None:
    card = (closed_form_bundle / "MODEL_CARD.md").read_text()
    assert "closed form" in card
    assert "inner optimiser" not in card and "None" not in card and "{" not in card
