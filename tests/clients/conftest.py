"""A bundle whose golden task was adapted by `reptile.runtime`, for the other consumers to match."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from schemas import validate_bundle

from reptile.data.dataset import PreparedData
from reptile.minibatches import mini_batches
from reptile.runtime import FewShotModel

SEED, STEPS = 5, 60


@pytest.fixture
def adapted_bundle(exported: Path, data: PreparedData, tmp_path: Path) -> Path:
    """A copy of the bundle with one golden task, and as its logits those of the runtime."""
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    model = FewShotModel.load(bundle)
    starts = data.split("test").starts[: model.ways]
    support = np.concatenate([data.images[start : start + 4] for start in starts])
    queries = np.concatenate([data.images[start + 4 : start + 9] for start in starts])
    labels = np.repeat(np.arange(model.ways), 4)
    adapted = model.adapt(support, labels, steps=STEPS, seed=SEED)

    session = model.bundle.open("predict_adapted", threads=1, providers=None)
    feeds = {"images": queries.astype(np.float32), **adapted.state.weights}
    (logits,) = session.run(["logits"], feeds)
    _, probabilities = adapted.predict(queries)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, probabilities, atol=1e-6)

    inputs: dict[str, np.ndarray] = {
        "support_images": support.astype(np.float32),
        "support_labels": labels,
        "batches": mini_batches(
            np.random.default_rng(SEED), len(labels), model.bundle.batch, STEPS
        ),
        "learning_rate": np.array(model.bundle.learning_rate, dtype=np.float32),
        "query_images": queries.astype(np.float32),
    }
    manifest = model.manifest | {"inner": {**model.manifest["inner"], "steps": STEPS}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(bundle / "golden")
    (bundle / "golden/own").mkdir(parents=True)
    for name, array in (inputs | {"logits": logits}).items():
        np.save(bundle / f"golden/own/{name}.npy", array)
    case = {
        "graph": "few_shot",
        "inputs": {name: f"own/{name}.npy" for name in inputs},
        "outputs": {"logits": "own/logits.npy"},
        "atol": 1e-4,
        "rtol": 0.0,
    }
    (bundle / "golden/golden.json").write_text(json.dumps({"cases": [case]}))
    validate_bundle(bundle)
    return bundle


@pytest.fixture
def spoilt(adapted_bundle: Path) -> Path:
    """The same bundle, one of whose expected logits is off by 1e-3."""
    path = adapted_bundle / "golden/own/logits.npy"
    logits = np.load(path)
    logits[-1, -1] += 1e-3 * (1 + abs(logits[-1, -1]))
    np.save(path, logits)
    return adapted_bundle


@pytest.fixture
def deviations() -> Callable[[str], list[float]]:
    """Read the deviations from an example's table."""

    def read(table: str) -> list[float]:
        head, *rows = (
            line.split()
            for line in table.splitlines()
            if not line.startswith(("adapted again", "refused"))
        )
        assert head[-1] == "deviation"
        return [float(next(word for word in row if "e-" in word or "e+" in word)) for row in rows]

    return read


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the examples and the C++ programs of tests/clients were built in."""
    if not (shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++"))):
        pytest.skip("no CMake or no C++ compiler")
    folder = tmp_path_factory.mktemp("cpp")
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1.*"), None)
    if library is None:
        pytest.skip("the installed onnxruntime has no libonnxruntime.so")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # what linker and loader look for
        (folder / name).symlink_to(library)
    sources, build = Path(__file__).parent, folder / "build"
    found = f"-DONNXRUNTIME_LIBRARY={folder / 'libonnxruntime.so'}"
    done = _call("cmake", "-S", sources, "-B", build, found, "-DCMAKE_BUILD_TYPE=Debug")
    if done.returncode and "ONNXRUNTIME_INCLUDE_DIR" in done.stderr:
        pytest.skip("no C++ headers of ONNX Runtime; tests/clients/onnxruntime-headers has a way")
    assert done.returncode == 0, done.stderr
    done = _call("cmake", "--build", build)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    return build


def _call(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
