"""The C++ consumer, built from clients/cpp against the installed library of ONNX Runtime.

Needs a compiler, CMake and ONNX Runtime's headers, which its Python package lacks: in a standard
place, or below a folder of the environment variable CMAKE_PREFIX_PATH (see onnxruntime-headers).
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Deviations = Callable[[str], list[float]]
Run = Callable[..., subprocess.CompletedProcess[str]]


def call(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


@pytest.fixture
def golden(built: Path) -> Run:
    return lambda bundle: call(built / "cpp/golden", bundle)


def test_it_gives_pytorchs_golden_logits(
    golden: Run, exported: Path, deviations: Deviations
) -> None:
    done = golden(exported)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(found := deviations(done.stdout)) >= 2
    assert max(found) < 1e-4
    assert re.search(r"^refused +ok$", done.stdout, re.MULTILINE)


def test_it_gives_the_runtimes_logits(
    golden: Run, adapted_bundle: Path, deviations: Deviations
) -> None:
    done = golden(adapted_bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(found := deviations(done.stdout)) == 1
    assert max(found) < 1e-4
    again = re.search(r"adapted again: (\d+) of 12", done.stdout)
    assert again is not None
    assert int(again[1]) >= 7, "by chance four"


def test_a_deviation_fails_it(golden: Run, spoilt: Path) -> None:
    done = golden(spoilt)
    assert done.returncode == 1
    assert "BEYOND THE TOLERANCE" in done.stdout


def test_a_refused_input_that_is_adapted_to_fails_it(
    golden: Run, exported: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    np.save(bundle / "golden/refused/learning_rate", np.float32(0.001))
    done = golden(bundle)
    assert done.returncode == 1
    assert re.search(r"^refused +ADAPTED", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("damage", ["cut", "type", "missing", "no graph"])
def test_what_cannot_be_read_is_one_line(damage: str, golden: Run, adapted_bundle: Path) -> None:
    queries, labels = (
        adapted_bundle / f"golden/own/{n}.npy" for n in ("query_images", "support_labels")
    )
    if damage == "cut":
        queries.write_bytes(queries.read_bytes()[:-1])
    elif damage == "type":
        shutil.copy(labels, queries)
    elif damage == "missing":
        queries.unlink()
    else:
        (adapted_bundle / "adapt/1/model.onnx").unlink()
    done = golden(adapted_bundle)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_it_gives_pytorchs_golden_logits_in_closed_form(
    golden: Run, closed_form_bundle: Path, deviations: Deviations
) -> None:
    done = golden(closed_form_bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(found := deviations(done.stdout)) == 3
    assert max(found) < 1e-4


def test_the_header_keeps_its_word(built: Path, exported: Path, closed_form_bundle: Path) -> None:
    done = call(built / "few_shot", exported, closed_form_bundle)
    assert done.returncode == 0, done.stderr
