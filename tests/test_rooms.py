"""The direction of imports between rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# Each room may import those before it, and itself.
ORDER = [
    {"errors", "files", "minibatches", "bundle_format", "settings", "provenance", "cpus", "images"},
    {"data"},
    {"models", "tasks", "objectives"},
    {"learn"},
    {"evaluate"},
    {"export"},
    {"stages", "api"},
    {"experiments"},
    {"rl"},
    {"serve"},
    {"cli"},
    {"__main__"},
]
RUNTIME = {"errors", "files", "minibatches", "bundle_format", "runtime"}
PACKAGE = Path(__file__).parent.parent / "reptile"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full dotted names of all modules a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rooms_to_its_left(path: Path) -> None:
    own = room(path)
    names = imported(path) - {"reptile.__version__"}
    rooms = {name.split(".")[1] for name in names if name.startswith("reptile.")}
    if own == "runtime" or own == "sklearn":
        assert rooms <= RUNTIME
    elif own == "serve":
        assert rooms <= RUNTIME | {"serve", "images"}
    elif own != "__init__":
        allowed = set().union(
            *ORDER[: 1 + next(i for i, group in enumerate(ORDER) if own in group)]
        )
        # `verify` runs a bundle as a consumer would, so it may import the runtime.
        consumer = own in {"export", "cli"}
        assert rooms <= allowed | ({"runtime"} if consumer else set())


def test_the_runtime_and_what_it_imports_need_numpy_and_onnxruntime_alone() -> None:
    sources = [path for path in MODULES if room(path) in RUNTIME]
    packages = {name.split(".")[0] for path in sources for name in imported(path)}
    assert packages - set(sys.stdlib_module_names) <= {"reptile", "numpy", "onnxruntime"}


def test_the_server_starts_without_what_only_the_stages_need() -> None:
    program = (
        "import sys, reptile.serve.run\n"
        "print(*sorted({'torch', 'onnx', 'onnxscript', 'dvc'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
