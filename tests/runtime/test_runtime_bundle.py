import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from reptile.errors import InputError
from reptile.runtime import FewShotModel
from reptile.runtime.bundle import open_bundle

Edit = Callable[[dict[str, Any]], Any]
ADAPT = "adapt/1/model.onnx"


def test_the_bundle_is_read_through_its_bytes(bundle: Path, images: np.ndarray) -> None:
    model = FewShotModel.load(str(bundle))
    for path in bundle.rglob("*.onnx"):
        path.unlink()  # nothing is opened later
    assert model.adapt(images, list("aabbccdd")).predict(images).labels


@pytest.mark.parametrize("name", [ADAPT, "golden/golden.json", "golden/adapt-0/losses.npy"])
def test_a_changed_file_is_refused(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[-1] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} does not match its SHA-256"):
        FewShotModel.load(bundle)


def test_a_missing_file_is_refused(bundle: Path) -> None:
    (bundle / ADAPT).unlink()
    with pytest.raises(InputError, match="is missing: the bundle is not complete"):
        FewShotModel.load(bundle)


def test_a_file_beside_the_listed_ones_is_left_alone(bundle: Path) -> None:
    (bundle / "model.sig").write_text("a signature of the manifest")
    FewShotModel.load(bundle)


def test_a_graph_that_no_hash_covers_is_refused(
    bundle: Path, rewrite_manifest: Callable[[Path, Edit], None]
) -> None:
    rewrite_manifest(bundle, lambda manifest: manifest["files"].pop(ADAPT))
    with pytest.raises(InputError, match=f"does not list the file '{ADAPT}'"):
        FewShotModel.load(bundle)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "a\\b", "C:x", "a//b", "", "a\0b", "a\n"]
)
def test_paths_out_of_the_bundle_are_refused(
    bundle: Path, rewrite_manifest: Callable[[Path, Edit], None], name: str
) -> None:
    rewrite_manifest(bundle, lambda manifest: manifest["files"].update({name: "0" * 64}))
    with pytest.raises(InputError, match="not a plain relative path inside the bundle"):
        FewShotModel.load(bundle)


def test_a_link_out_of_the_bundle_is_refused(bundle: Path) -> None:
    outside = bundle.parent / "outside.onnx"
    (bundle / ADAPT).rename(outside)
    (bundle / ADAPT).symlink_to(outside)
    with pytest.raises(InputError, match=r"links out of the bundle.*cp -rL"):
        FewShotModel.load(bundle)


def test_a_file_that_cannot_be_read_is_an_input_error(
    bundle: Path, rewrite_manifest: Callable[[Path, Edit], None]
) -> None:
    rewrite_manifest(bundle, lambda manifest: manifest["files"].update({"x" * 999: "0" * 64}))
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        FewShotModel.load(bundle)


def test_a_linked_bundle_is_fine(bundle: Path) -> None:
    (bundle.parent / "latest").symlink_to(bundle)
    FewShotModel.load(bundle.parent / "latest")


def setting(path: str, value: Any) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            manifest = manifest[key]
        manifest[last] = value

    return edit


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("format", 5, "format 5 is not a format this version reads .1 to 4."),
        ("format", "1", "format must be int, got '1'"),
        ("task", None, "task must be dict, got None"),
        ("task.kind", "clustering", "task.kind must be classification or regression"),
        ("task.ways", True, "task.ways must be int, got True"),
        ("task.ways", 1, r"task.ways must lie in 2\.\."),
        ("task.ways", 5, r"predict_adapted.outputs must be logits: float32\[\?, 5\], got"),
        ("task.layout", "NHWC", "task.layout must be 'NCHW'"),
        ("task.pixel_range", [0, 1], r"task.pixel_range must be \[0, 255\]"),
        ("task.image_shape", [1, 3], "image_shape must be"),
        ("task.image_shape", [3, 3, 5], r"adapt.inputs must be support_images: float32\[\?, 3, 3"),
        ("inner.steps", 51, r"inner.steps must lie in 0\.\.50, got 51"),
        ("inner.batch", 0, "inner.batch must lie in 1"),
        ("inner.learning_rate", 0, "learning_rate must be above 0"),
        ("inner.learning_rate", "x", "learning_rate must be int or float, got 'x'"),
        ("inner.replacement", 0, "inner.replacement must be bool, got 0"),
        ("limits.max_support", 1e3, "limits.max_support must be int"),
        ("graphs", [], r"graphs must be dict, got \[\]"),
        ("graphs", {}, "graph 'adapt' is missing"),
        ("graphs.adapt.path", 3, "graphs.adapt.path must be str"),
        ("graphs.adapt.inputs", [], "graphs.adapt.inputs must be .*, got none"),
        ("graphs.adapt.outputs", [{"name": "x"}], "dtype must be str, got None"),
        ("files", None, "files must be dict"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(
    bundle: Path, rewrite_manifest: Callable[[Path, Edit], None], path: str, value: Any, words: str
) -> None:
    rewrite_manifest(bundle, setting(path, value))
    with pytest.raises(InputError, match=words) as caught:
        FewShotModel.load(bundle)
    assert "manifest.json" in str(caught.value)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value, with each of its keys or indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(items):
        yield value, key
        if isinstance(child, dict | list):
            yield from places(child)


@pytest.mark.parametrize("junk", [None, True, -1, 2**70, 0.5, "x", [], {"x": None}])
def test_no_junk_in_the_manifest_gives_another_error(
    bundle: Path, rewrite_manifest: Callable[[Path], None], junk: Any
) -> None:
    shutil.rmtree(bundle / "golden")  # many files to hash, and nothing new
    rewrite_manifest(bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    for container, key in places(manifest):
        before, container[key] = container[key], junk
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        with contextlib.suppress(InputError):
            open_bundle(bundle)
        container[key] = before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not strict JSON"),
        ('{"format": NaN}', "NaN is not a number"),
        ('{"format": 1, "format": 1}', "a key occurs twice"),
        ("[" * 100_000, "not strict JSON"),
        ("[]", "format must be int, got None"),
        ("é".encode("latin-1"), "not strict JSON"),
        (" " * (1 << 20) + "{}", "larger than 1048576 bytes"),
    ],
)
def test_a_manifest_that_is_no_strict_json_is_refused(
    bundle: Path, text: str | bytes, words: str
) -> None:
    content = text.encode() if isinstance(text, str) else text
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=words):
        FewShotModel.load(bundle)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        FewShotModel.load(tmp_path / "absent")
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        FewShotModel.load(tmp_path)


def test_a_graph_other_than_the_manifest_says_is_refused(
    bundle: Path, rewrite_manifest: Callable[[Path, Edit], None]
) -> None:
    before = json.loads((bundle / "manifest.json").read_text())["graphs"]
    model = onnx.load(bundle / ADAPT)
    model.graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, []))
    onnx.save(model, bundle / ADAPT)
    rewrite_manifest(bundle, setting("graphs", before))
    with pytest.raises(InputError, match=r"disagree on its inputs: .* against .*more: float32\[\]"):
        FewShotModel.load(bundle)


def test_a_file_that_is_no_graph_is_refused(
    bundle: Path, rewrite_manifest: Callable[[Path, Edit], None]
) -> None:
    before = json.loads((bundle / "manifest.json").read_text())
    (bundle / ADAPT).write_bytes(b"not a graph")
    before["files"][ADAPT] = hashlib.sha256(b"not a graph").hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(before))
    with pytest.raises(InputError, match="cannot open the graph 'adapt'"):
        FewShotModel.load(bundle)


def test_the_golden_cases_hold(model: FewShotModel) -> None:
    assert 0 <= model.check() < 1e-4


def edit_golden(bundle: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = bundle / "golden/golden.json"
    golden = json.loads(path.read_text())
    edit(golden)
    path.write_text(json.dumps(golden))


def nan_losses(bundle: Path) -> None:
    path = bundle / "golden/adapt-0/losses.npy"
    np.save(path, np.load(path) * np.nan)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: np.save(b / "golden/adapt-0/learning_rate", np.float32(0.4)), "deviates by"),
        (lambda b: np.save(b / "golden/adapt-0/finite", np.array(False)), "'finite' deviates by 1"),
        (nan_losses, "'losses' deviates by nan"),
        (lambda b: np.save(b / "golden/adapt-0/losses", np.zeros(2)), r"expected float64 \(2,\)"),
        (lambda b: np.save(b / "golden/adapt-0/losses", np.array([None])), "not a .npy file"),
        (lambda b: (b / "golden/adapt-0/losses.npy").write_bytes(b""), "not a .npy file"),
        (
            lambda b: edit_golden(b, lambda g: g["cases"][0].pop("atol")),
            "a case: atol must be int or float",
        ),
        (lambda b: edit_golden(b, lambda g: g.update(cases=[])), "has no cases"),
        (lambda b: edit_golden(b, lambda g: g.update(cases=3)), "cases must be list"),
        (
            lambda b: edit_golden(b, lambda g: g["cases"][0].update(graph="x")),
            "there is no graph 'x'",
        ),
    ],
)
def test_the_self_check_finds_what_is_wrong(
    bundle: Path,
    rewrite_manifest: Callable[[Path], None],
    damage: Callable[[Path], Any],
    words: str,
) -> None:
    damage(bundle)
    rewrite_manifest(bundle)
    with pytest.raises(InputError, match=words):
        FewShotModel.load(bundle).check()


ONLY_NUMPY_AND_ONNXRUNTIME = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "torch", "torchvision", "onnx", "onnxscript", "PIL", "pydantic", "sklearn", "scipy",
            "safetensors", "yaml", "typer", "rich", "matplotlib", "pandas", "jinja2",
        }:
            raise AssertionError(f"the runtime imports {name}")

sys.meta_path.insert(0, Refuse())
import numpy as np
from reptile.runtime import FewShotModel

assert "onnxruntime" not in sys.modules  # so that its absence gives a clear error at load
model = FewShotModel.load(sys.argv[1])
images = np.random.default_rng(0).integers(0, 256, (4, 1, 3, 5))
adapted = model.adapt(images, ["cat", "cat", "dog", "dog"])
adapted.save(sys.argv[2])
assert (model.load_adapted(sys.argv[2]).predict(images).labels == adapted.predict(images).labels)
assert model.check() < 1e-4
ours = {name for name in sys.modules if name.startswith("reptile.")}
assert all(n.startswith("reptile.runtime") for n in ours - {
    "reptile.bundle_format", "reptile.errors", "reptile.files", "reptile.minibatches"}), ours
"""


def test_the_runtime_needs_numpy_and_onnxruntime_only(
    bundle: Path, root: Path, tmp_path: Path
) -> None:
    script = ONLY_NUMPY_AND_ONNXRUNTIME
    command = [sys.executable, "-c", script, str(bundle), str(tmp_path / "task")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
