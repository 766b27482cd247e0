"""What the bundle's folder holds, and that it is written whole and reproducibly."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.export import write as module
from reptile.export.write import export_bundle
from reptile.files import sha256_file
from reptile.learn.checkpoint import Checkpoint
from reptile.runtime import FewShotModel
from reptile.runtime.provider import open_session
from reptile.settings import EvaluateSettings, ExportSettings

GRAPHS = {"predict", "adapt", "predict_adapted", "few_shot"}


@pytest.fixture
def manifest(exported: Path) -> dict[str, Any]:
    return json.loads((exported / "manifest.json").read_text())


def test_every_file_is_listed_with_its_hash(exported: Path, manifest: dict[str, Any]) -> None:
    found = {
        path.relative_to(exported).as_posix(): sha256_file(path)
        for path in exported.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert found == manifest["files"]
    assert {name for name in found if name.endswith(".onnx")} == {
        f"{graph}/1/model.onnx" for graph in GRAPHS
    }


def test_manifest_describes_task_model_and_inner_loop(
    manifest: dict[str, Any], checkpoint: Checkpoint
) -> None:
    assert manifest["format"] == 3 and manifest["name"] == "patterns"
    assert manifest["task"] == {
        "kind": "classification",
        "ways": 3,
        "image_shape": [1, 12, 12],
        "layout": "NCHW",
        "pixel_range": [0, 255],
        "dtype": "float32",
    }
    assert manifest["learner"] == "gradient"
    assert manifest["inner"] == {
        "optimizer": "adam",
        "learning_rate": 0.001,
        "weight_decay": 1.0,
        "steps": 10,
        "batch": 4,
        "replacement": False,
    }
    assert manifest["limits"] == {"max_steps": 60, "max_support": 50}
    assert manifest["metrics"]["scores"]["patterns"]["1"]["trained"]["frozen"]["mean"] == 0.75
    assert manifest["provenance"]["data_sha256"] == checkpoint.info.data_sha256


def test_tensors_have_the_names_types_and_free_sizes_of_the_format(
    manifest: dict[str, Any],
) -> None:
    graphs = manifest["graphs"]
    assert set(graphs) == GRAPHS
    task = [
        {"name": "support_images", "dtype": "float32", "shape": ["support", 1, 12, 12]},
        {"name": "support_labels", "dtype": "int64", "shape": ["support"]},
        {"name": "batches", "dtype": "int64", "shape": ["steps", "batch"]},
        {"name": "learning_rate", "dtype": "float32", "shape": []},
    ]
    trace = [
        {"name": "losses", "dtype": "float32", "shape": ["steps"]},
        {"name": "finite", "dtype": "bool", "shape": []},
    ]
    weights = [
        {"name": name, "dtype": "float32", "shape": shape}
        for name, shape in manifest["adapted"].items()
    ]
    images = {"name": "images", "dtype": "float32", "shape": ["images", 1, 12, 12]}
    queries = {"name": "query_images", "dtype": "float32", "shape": ["queries", 1, 12, 12]}
    logits = {"name": "logits", "dtype": "float32", "shape": ["images", 3]}
    assert graphs["predict"]["inputs"] == [images]
    assert graphs["predict"]["outputs"] == [logits]
    assert graphs["adapt"]["inputs"] == task
    assert graphs["adapt"]["outputs"] == trace + weights
    assert graphs["predict_adapted"]["inputs"] == [images, *weights]
    assert graphs["predict_adapted"]["outputs"] == [logits]
    assert graphs["few_shot"]["inputs"] == [*task, queries]
    assert graphs["few_shot"]["outputs"] == [*trace, {**logits, "shape": ["queries", 3]}]
    layers = [f"conv{layer}.{kind}" for layer in range(1, 5) for kind in ("weight", "bias")]
    assert list(manifest["adapted"]) == [*layers, "head.weight", "head.bias"]


def test_graphs_are_portable(exported: Path) -> None:
    for graph in GRAPHS:
        model = onnx.load(exported / f"{graph}/1/model.onnx")
        assert model.ir_version == 8
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
        assert not model.functions
        assert model.producer_name == "reptile"


def test_golden_tensors_cover_every_graph_and_stay_small(exported: Path) -> None:
    cases = json.loads((exported / "golden/golden.json").read_text())["cases"]
    assert {case["graph"] for case in cases} == GRAPHS
    assert {
        len(np.load(exported / "golden" / case["inputs"]["batches"]))
        for case in cases
        if case["graph"] == "adapt" and "losses" in case["outputs"]
    } == {0, 5, 50}
    assert all(case["atol"] <= 1e-2 and case["rtol"] <= 1e-2 for case in cases)
    assert sum(path.stat().st_size for path in exported.rglob("*")) < 1_000_000


def test_a_golden_task_lacks_a_class_and_crosses_shuffles(exported: Path) -> None:
    folder = exported / "golden/crossing-5"
    labels, batches, logits = (
        np.load(folder / f"{name}.npy") for name in ("support_labels", "batches", "logits")
    )
    assert set(labels) == {1, 2}
    assert (logits[:, 0] < -1e8).all()
    assert batches.shape == (5, len(labels) - 1)
    assert any(len(set(row)) < len(row) for row in batches.tolist())
    whole = batches.reshape(-1)[: batches.size // len(labels) * len(labels)]
    assert (np.sort(whole.reshape(-1, len(labels))) == np.arange(len(labels))).all()


@pytest.mark.parametrize("rate", [None, np.float32(0.001)])
def test_a_golden_input_is_refused_by_the_graph_and_a_usable_one_is_not(
    exported: Path, rate: np.float32 | None
) -> None:
    cases = json.loads((exported / "golden/golden.json").read_text())["cases"]
    (refused,) = (case for case in cases if [*case["outputs"]] == ["finite"])
    feeds = {n: np.load(exported / "golden" / file) for n, file in refused["inputs"].items()}
    if rate is not None:
        feeds["learning_rate"] = np.array(rate)
    session = open_session((exported / "adapt/1/model.onnx").read_bytes(), "adapt")
    assert session.run(["finite"], feeds)[0] == (rate is not None)
    assert not np.load(exported / "golden" / refused["outputs"]["finite"])


def test_the_runtime_adapts_and_predicts(exported: Path, data: PreparedData) -> None:
    model = FewShotModel.load(exported)
    assert model.check() < 1e-4
    rows = data.split("test").starts[1:4]
    adapted = model.adapt(data.images[rows], ["a", "b", "c"], steps=60)
    assert adapted.predict(data.images[rows]).labels == ["a", "b", "c"]


def test_model_card_tells_what_it_is_and_how_well_it_does(exported: Path) -> None:
    card = (exported / "MODEL_CARD.md").read_text()
    assert card.startswith("# patterns\n")
    assert "| method | batch norm | patterns 1-shot |" in card
    assert "| trained learner |  | 75.0 ± 1.0 |" in card
    assert "| raw input, nearest mean |  | 50.0 ± 2.0 |" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
    assert "None" not in card and "{" not in card


def test_a_failed_export_leaves_the_old_bundle(
    bundle: Path,
    checkpoint: Checkpoint,
    data: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = sha256_file(bundle / "manifest.json")
    monkeypatch.setattr(module, "build_graphs", lambda *_: {})
    with pytest.raises(KeyError):  # there is no graph to describe
        export_bundle(ExportSettings(), checkpoint, data, None, bundle, protocol=EvaluateSettings())
    assert sha256_file(bundle / "manifest.json") == before
    assert list(bundle.parent.iterdir()) == [bundle]


def test_fewer_steps_than_the_bundle_takes_by_default_are_refused(
    checkpoint: Checkpoint, data: PreparedData, tmp_path: Path
) -> None:
    settings = ExportSettings(max_steps=9)
    with pytest.raises(InputError, match=r"export.max_steps = 9 .* evaluate.steps = 10"):
        export_bundle(
            settings, checkpoint, data, None, tmp_path / "b", protocol=EvaluateSettings(steps=10)
        )
