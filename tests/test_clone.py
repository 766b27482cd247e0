"""The pipeline from a fresh clone, as `make` and DVC run it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from patterns import draw_letters

pytestmark = pytest.mark.slow

SMALLER = {
    "train": {"model": {"filters": 8}, "meta_iterations": 200, "checkpoint_every": 100},
    "beside": {"model": {"filters": 8}, "meta_iterations": 100, "checkpoint_every": 100},
    "evaluate": {"tasks": 20, "steps": 10},
    "export": {"gate": {"accuracy": 0.0, "above_random": -1.0, "insist": True}},
    "verify": {"tasks": 60, "steps": 5},
}
STAGES = ["prepare", "train", "train-beside", "evaluate", "export", "verify"]
ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """Of a person who works in a clone: nothing but the environment's programs on the path."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONSAFEPATH"}
    }
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def make_repro(folder: Path) -> str:
    """`make repro`, in the environment that runs the tests."""
    return run(folder, "make", "-o", "setup", f"VENV={sys.prefix}", "repro")


def stages_run(output: str) -> list[str]:
    lines = [line for line in output.splitlines() if line.startswith("Running stage")]
    return [line.split("'")[1] for line in lines]


def comment(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "# a comment\n", encoding="utf-8")


def new_clone(folder: Path) -> Path:
    clone = folder / "clone"
    run(folder, "git", "clone", "--quiet", str(ROOT), str(clone))
    run(clone, "git", "config", "user.email", "tests@example.org")
    run(clone, "git", "config", "user.name", "tests")
    return clone


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A clone in which the whole pipeline has run with smaller settings, and what it printed."""
    clone = new_clone(tmp_path_factory.mktemp("first"))
    params = yaml.safe_load((clone / "params.yaml").read_text())
    for stage, changes in SMALLER.items():
        params[stage] |= changes
    (clone / "params.yaml").write_text(yaml.safe_dump(params))
    return clone, make_repro(clone)


@pytest.fixture
def clone(first: tuple[Path, str]) -> Path:
    """That clone, with its code as committed and all stages up to date."""
    folder, _ = first
    run(folder, "git", "checkout", "--quiet", "--", "reptile")
    run(folder, "dvc", "repro", "--quiet")
    return folder


def test_a_clone_runs_with_its_own_data_and_prints_no_warning(first: tuple[Path, str]) -> None:
    _, output = first
    assert stages_run(output) == STAGES
    assert "checks passed" in output
    for word in ("warning", "unable", "error"):
        assert word not in output.lower()


def test_a_second_run_has_nothing_to_do(clone: Path) -> None:
    bundle = clone / "artifacts/bundle/manifest.json"
    before = bundle.stat().st_mtime_ns
    again = make_repro(clone)
    assert stages_run(again) == []
    assert "up to date" in again
    assert bundle.stat().st_mtime_ns == before


def test_byte_code_and_the_server_are_no_change(clone: Path) -> None:
    run(clone, "python", "-m", "compileall", "-q", "reptile")
    assert list((clone / "reptile/learn").glob("__pycache__/*.pyc"))
    (clone / "reptile/learn/engines/native/kernel.so").write_bytes(b"compiled")
    for path in (clone / "reptile/serve").rglob("*.*"):
        if path.suffix in {".py", ".js"}:
            path.write_bytes(path.read_bytes() + b"\n")
    comment(clone / "reptile/cli/__init__.py")
    assert "up to date" in run(clone, "dvc", "status")


def test_a_check_of_verify_reruns_verify_alone(clone: Path) -> None:
    comment(clone / "reptile/export/verify/parity.py")
    assert stages_run(run(clone, "dvc", "repro")) == ["verify"]


def test_the_gate_reruns_export(clone: Path) -> None:
    comment(clone / "reptile/evaluate/gate.py")
    assert stages_run(run(clone, "dvc", "repro")) == ["export"]  # whose bundle is the same


def test_a_changed_default_reruns_the_stages(clone: Path) -> None:
    comment(clone / "reptile/settings.py")
    output = run(clone, "dvc", "status")
    for stage in STAGES:
        assert f"{stage}:" in output


def test_a_comment_in_the_server_leaves_a_killed_training_to_be_resumed(clone: Path) -> None:
    shutil.copytree(clone / "artifacts/prepared", clone / "artifacts/killed/prepared")
    command = ["-m", "reptile", "train", "--resume", "--artifacts", "artifacts/killed"]
    command += ["-S", "train.meta_iterations=100000", "-S", "train.checkpoint_every=5"]
    training = subprocess.Popen([sys.executable, *command], cwd=clone, env=environment())
    try:
        work = clone / "artifacts/killed/training"
        deadline = time.monotonic() + 120
        while not list(work.glob("*/iteration-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    comment(clone / "reptile/serve/app.py")
    listed = run(clone, "python", *command[:2], "runs", *command[4:])
    assert "; resumed" in listed
    comment(clone / "reptile/learn/train.py")
    listed = run(clone, "python", *command[:2], "runs", "--remove", *command[4:])
    assert "removed: other code" in listed


def prepared(clone: Path, *path: str) -> np.ndarray:
    array: np.ndarray = np.load(clone.joinpath("artifacts/prepared", *path))
    return array


def set_prepare(clone: Path, **changes: object) -> None:
    params = yaml.safe_load((clone / "params.yaml").read_text())
    small = {"held_out": "classes", "rotations": False, "images_per_class": 6}
    params["prepare"] |= small | {"image_size": 14, "validation": 1, "test": 2} | changes
    (clone / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.mark.parametrize("source", ["digits", "glyphs", "sinusoid"])
def test_dvc_prepares_sources_that_are_names(tmp_path: Path, source: str) -> None:
    clone = new_clone(tmp_path)
    set_prepare(clone, source=source, cross_domain=[], validation=0)
    assert stages_run(run(clone, "dvc", "repro", "prepare")) == ["prepare"]
    assert "up to date" in run(clone, "dvc", "status", "prepare")


def test_dvc_prepares_again_when_the_data_of_another_domain_changes(tmp_path: Path) -> None:
    clone = new_clone(tmp_path)
    draw_letters(clone / "datasets/letters")
    draw_letters(clone / "datasets/other")
    run(clone, "dvc", "add", "--quiet", "datasets/letters", "datasets/other")
    set_prepare(clone, source="datasets/letters", cross_domain=["datasets/other"])
    run(clone, "dvc", "repro", "prepare")
    before = prepared(clone, "cross_domain/other/images.npy")
    shutil.rmtree(next((clone / "datasets/other").glob("*/")))
    run(clone, "dvc", "add", "--quiet", "datasets/other")
    assert stages_run(run(clone, "dvc", "repro", "prepare")) == ["prepare"]
    assert len(prepared(clone, "cross_domain/other/images.npy")) < len(before)


def test_dvc_refuses_data_of_another_domain_that_it_does_not_follow(tmp_path: Path) -> None:
    clone = new_clone(tmp_path)
    draw_letters(clone / "elsewhere")
    set_prepare(clone, source="digits", cross_domain=["elsewhere"], validation=0)
    done = subprocess.run(
        ["dvc", "repro", "prepare"], cwd=clone, env=environment(), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "elsewhere" in done.stderr
    assert "datasets/" in done.stderr


def test_a_queued_experiment_runs_its_own_code(tmp_path: Path) -> None:
    clone = new_clone(tmp_path)
    set_prepare(clone, source="digits", cross_domain=[], validation=0)
    run(clone, "git", "commit", "--quiet", "--all", "--message", "settings")
    code = clone / "reptile/data/prepare.py"
    with code.open("a") as file:
        file.write("\nprint('the code of the experiment')\n")
    run(clone, "dvc", "exp", "run", "--quiet", "--queue", "--name", "changed", "prepare")
    run(clone, "git", "checkout", "--quiet", "--", "reptile")
    assert "the code of the experiment" in run(clone, "dvc", "exp", "run", "--run-all")
