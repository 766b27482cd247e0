"""The Python consumers run as they stand, and find what the runtime and eager PyTorch find."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np

PLAIN = "with_onnxruntime.py"
Deviations = Callable[[str], list[float]]


def run(root: Path, script: str, bundle: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, root / "clients/python" / script, bundle],
        capture_output=True,
        text=True,
        check=False,
    )


def test_onnxruntime_alone_gives_pytorchs_golden_logits(
    root: Path, exported: Path, deviations: Deviations
) -> None:
    done = run(root, PLAIN, exported)
    assert done.returncode == 0, done.stdout + done.stderr
    found = deviations(done.stdout)
    assert len(found) >= 4, "both ways for tasks of several step counts"
    assert max(found) < 1e-4
    assert re.search(r"^refused +ok$", done.stdout, re.MULTILINE)


def test_onnxruntime_alone_gives_the_runtimes_logits(
    root: Path, adapted_bundle: Path, deviations: Deviations
) -> None:
    done = run(root, PLAIN, adapted_bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(found := deviations(done.stdout)) == 2
    assert max(found) < 1e-4
    again = re.search(r"adapted again: (\d+) of 12", done.stdout)
    assert again is not None
    assert int(again[1]) >= 7, "by chance four"


def test_both_examples_run_a_closed_form_bundle(
    root: Path, closed_form_bundle: Path, deviations: Deviations
) -> None:
    done = run(root, PLAIN, closed_form_bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(found := deviations(done.stdout)) == 6
    assert max(found) < 1e-4
    done = run(root, "with_reptile.py", closed_form_bundle)
    assert done.returncode == 0, done.stderr
    assert "loss" not in done.stdout
    assert re.search(r"^class \d +\d+\.\d%$", done.stdout, re.MULTILINE)


def test_a_deviation_fails_the_plain_example(root: Path, spoilt: Path) -> None:
    done = run(root, PLAIN, spoilt)
    assert done.returncode == 1
    assert "BEYOND THE TOLERANCE" in done.stdout


def test_a_refused_input_that_is_adapted_to_fails_the_plain_example(
    root: Path, exported: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    np.save(bundle / "golden/refused/learning_rate", np.float32(0.001))
    done = run(root, PLAIN, bundle)
    assert done.returncode == 1
    assert re.search(r"^refused +ADAPTED", done.stdout, re.MULTILINE)


def test_the_plain_example_needs_nothing_of_this_project(root: Path, exported: Path) -> None:
    script = f"""
import runpy, sys
sys.modules["reptile"] = sys.modules["torch"] = None  # importing them fails
sys.argv = [{PLAIN!r}, {str(exported)!r}]
runpy.run_path({str(root / "clients/python" / PLAIN)!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_its_mini_batches_are_the_papers(root: Path) -> None:
    sys.path.insert(0, str(root / "clients/python"))
    try:
        mini_batches = import_module("with_onnxruntime").mini_batches
    finally:
        sys.path.pop(0)
    for support, batch, steps in ((7, 3, 10), (5, 5, 4), (2, 10, 3), (6, 4, 0)):
        inner = {"steps": steps, "batch": batch, "replacement": False}
        rows = mini_batches(np.random.default_rng(0), support, inner)
        assert rows.shape == (steps, min(batch, support))
        assert rows.dtype == np.int64
        whole = rows.size // support * support
        for shuffle in rows.reshape(-1)[:whole].reshape(-1, support):
            assert sorted(shuffle) == list(range(support))
    drawn = mini_batches(
        np.random.default_rng(0), 7, {"steps": 20, "batch": 3, "replacement": True}
    )
    assert drawn.shape == (20, 3)
    assert all(len(set(row)) == 3 for row in drawn.tolist())


def test_the_runtime_example_learns_saves_and_names(root: Path, exported: Path) -> None:
    done = run(root, "with_reptile.py", exported)
    assert done.returncode == 0, done.stderr
    assert "golden tensors within" in done.stdout
    assert re.search(r"loss \d\.\d+ → \d\.\d+", done.stdout)
    assert re.search(r"^class \d +\d+\.\d%$", done.stdout, re.MULTILINE)
