"""The oldest and the newest ONNX Runtime that can be installed here give the golden tensors.

Each in an environment of its own, from a package index: `make test-versions`.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

NUMPY_2 = Version("1.19")  # the first ONNX Runtime that is built for it

# What the package's consumers do: golden tensors, adapt, save, load, predict.
CONSUMER = """
import sys
from pathlib import Path
import numpy as np
from reptile.runtime import FewShotModel

bundle, saved = map(Path, sys.argv[1:])
model = FewShotModel.load(bundle)
model.check()
images = np.load(bundle / "golden/adapt-5/support_images.npy")
adapted = model.adapt(images, ["a", "b", "c"], seed=3)
adapted.save(saved)
assert (model.load_adapted(saved).logits(images) == adapted.logits(images)).all()
print(*adapted.logits(images).ravel())
"""


def requirement(root: Path, extra: str) -> Requirement:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (only,) = project["optional-dependencies"][extra]
    return Requirement(only)


def lowest(root: Path) -> Version:
    (bound,) = requirement(root, "cpu").specifier
    assert bound.operator == ">="
    return Version(bound.version)


def lowest_numpy(root: Path) -> str:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = Requirement(project["dependencies"][0]).specifier
    assert bound.operator == ">="
    return f"numpy~={bound.version}.0"


def available() -> list[Version]:
    """Return the releases that the package index has for this Python, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "onnxruntime"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = re.findall(r"Available versions: (.*)", listed)
    return sorted(map(Version, line.split(", ")))


def environment(folder: Path, *packages: str) -> Path:
    """Create an environment and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *packages], check=True)
    return python


def run(*command: object, root: Path) -> str:
    done = subprocess.run(
        [*map(str, command)],
        env={"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_both_extras_have_the_same_minimum(root: Path) -> None:
    assert requirement(root, "gpu").specifier == requirement(root, "cpu").specifier
    docs = (root / "docs/consumers.md").read_text(encoding="utf-8")
    assert f"onnxruntime {lowest(root)}, the oldest that the package allows" in docs


@pytest.mark.versions
def test_the_oldest_and_the_newest_that_the_package_allows_agree(
    root: Path, exported: Path, tmp_path: Path
) -> None:
    allowed = [version for version in available() if version >= lowest(root)]
    logits = []
    for version, numpy in ((allowed[0], lowest_numpy(root)), (allowed[-1], "numpy")):
        python = environment(tmp_path / str(version), f"onnxruntime=={version}", numpy)
        saved = tmp_path / f"{version}.task"
        printed = run(python, "-c", CONSUMER, exported, saved, root=root)
        logits.append([float(each) for each in printed.split()])
        print(f"onnxruntime {version}, {numpy}: {len(logits[-1])} logits")
    assert logits[0] == pytest.approx(logits[1], abs=1e-3)


@pytest.mark.versions
def test_the_graphs_run_in_the_oldest_that_can_be_installed(
    root: Path, exported: Path, tmp_path: Path
) -> None:
    oldest = available()[0]
    numpy = "numpy<2" if oldest < NUMPY_2 else "numpy"
    python = environment(tmp_path / "oldest", f"onnxruntime=={oldest}", numpy)
    printed = run(python, root / "clients/python/with_onnxruntime.py", exported, root=root)
    assert printed.count(" ok") >= 4
    print(f"onnxruntime {oldest}, {numpy}\n{printed}")
