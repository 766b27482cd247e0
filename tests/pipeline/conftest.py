"""A clone of the project with little data in it, tracked by DVC, in which pipelines run quickly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from patterns import draw_letters

ROOT = Path(__file__).parent.parent.parent

SMALL = {
    "prepare": {
        "source": "data/letters",
        "cross_domain": [],
        "image_size": 14,
        "validation": 0.2,
        "test": 0.2,
        "images_per_class": 6,
    },
    "train": {
        "model": {"filters": 8},
        "train_shots": 5,
        "inner_steps": 3,
        "inner_batch": 5,
        "meta_batch": 2,
        "meta_iterations": 6,
        "checkpoint_every": 3,
        "validation_tasks": 2,
    },
    "evaluate": {"tasks": 6, "shots": [1, 2], "steps": 5},
    "export": {"gate": {"accuracy": 0.0, "above_random": -1.0}},
    "verify": {"tasks": 40, "steps": 5},
}


def environment() -> dict[str, str]:
    """The environment of this interpreter's programs, so that they see the same packages."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(folder: Path, *command: str) -> str:
    """Run a command that must succeed; return what it prints, on stdout and stderr."""
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


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of this project as it is committed, with small data and settings committed on top."""
    folder = tmp_path_factory.mktemp("small") / "clone"
    run(folder.parent, "git", "clone", "--quiet", str(ROOT), str(folder))
    draw_letters(folder / "data/letters")
    run(folder, "dvc", "add", "--quiet", "data")
    run(folder, "dvc", "push", "--quiet", "data.dvc")
    (folder / "params.yaml").write_text(yaml.safe_dump(SMALL))
    run(folder, "git", "add", "--all")
    author = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    run(folder, "git", *author, "commit", "--quiet", "--message", "small")
    return folder


class Pipeline:
    """`python -m pipeline run-local` in a clone, with folders of its own."""

    def __init__(self, clone: Path, folder: Path) -> None:
        self._clone = clone
        self.output, self.work = folder / "runs", folder / "work"

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Start a run, in a process group of its own."""
        places = ("--output", str(self.output), "--work", str(self.work))
        return subprocess.Popen(
            (sys.executable, "-m", "pipeline", "run-local", *places, *options),
            cwd=self._clone,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *options: str) -> tuple[int, str, Path]:
        """Run to the end; return the exit code, what was printed, and the run's folder."""
        process = self.start(*options)
        printed, _ = process.communicate()
        return process.returncode, printed, max(self.output.iterdir())


@pytest.fixture
def pipeline(clone: Path, tmp_path: Path) -> Pipeline:
    return Pipeline(clone, tmp_path)


@pytest.fixture(scope="session")
def delivered(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """A run in which nothing goes wrong."""
    points = ("--point", "2-way 1-shot frozen", "--point", "5-way 2-shot frozen")
    folder = tmp_path_factory.mktemp("delivered")
    return Pipeline(clone, folder)(*points, "--bundle-remote", str(folder / "remote"))
