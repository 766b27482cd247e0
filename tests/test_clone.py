"""The pipeline from a fresh clone, as DVC runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

SMALLER = {
    "train": {"model": {"filters": 8}, "meta_iterations": 40, "checkpoint_every": 20},
    "evaluate": {"tasks": 20, "steps": 10},
    "export": {"gate": {"accuracy": 0.0, "above_random": -1.0}},
    "verify": {"tasks": 60, "steps": 5},
}


def run(folder: Path, *command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_clone_runs_with_its_own_data_and_then_has_nothing_to_do(
    root: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(root), str(clone))
    params = yaml.safe_load((clone / "params.yaml").read_text())
    for stage, changes in SMALLER.items():
        params[stage] |= changes
    (clone / "params.yaml").write_text(yaml.safe_dump(params))

    run(clone, "dvc", "repro", "--pull")
    shown = run(clone, "reptile", "show")
    assert "glyphs" in shown
    assert "checks passed" in shown
    bundle = clone / "artifacts/bundle/manifest.json"
    before = bundle.stat().st_mtime_ns

    again = run(clone, "dvc", "repro", "--pull")
    assert "Running stage" not in again
    assert "up to date" in again
    assert bundle.stat().st_mtime_ns == before
