"""What the images install: the versions that are tested, each file known by its hash."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)==([^\s;]+)", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", m[1]).lower(): m[2] for m in found if m}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_package_is_pinned_with_hashes_and_no_address(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", "\n".join(li for li in text.splitlines() if li[:1] != "#"))
    assert len(entries) > 10
    for entry in filter(None, entries):
        assert re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", entry, re.DOTALL), entry
    assert "://" not in text


@pytest.mark.parametrize(
    ("lock", "extras"), [("train", ["train", "dvc", "kubeflow"]), ("serve", ["serve"])]
)
@pytest.mark.parametrize("ort", ["cpu", "gpu"])
def test_a_lock_pins_a_fitting_version_of_all_that_the_project_asks_for(
    lock: str, extras: list[str], ort: str
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["optional-dependencies"][extra] for extra in (*extras, ort)]
    found = pins(ROOT / f"requirements/{lock}-{ort}.txt")
    for text in [*project["dependencies"], *(line for group in groups for line in group)]:
        wanted = Requirement(text)
        assert found.get(wanted.name, "missing") in wanted.specifier, text


def test_the_image_has_the_versions_that_are_tested_and_one_onnx_runtime() -> None:
    tested = pins(ROOT / "constraints.txt")
    cpu, gpu = (pins(ROOT / f"requirements/train-{ort}.txt") for ort in ("cpu", "gpu"))
    assert cpu.pop("onnxruntime") == tested["onnxruntime"]
    assert gpu.pop("onnxruntime-gpu")
    assert cpu == gpu
    assert {name: version for name, version in cpu.items() if tested.get(name) != version} == {
        "setuptools": pins(ROOT / "requirements/build.txt")[
            "setuptools"
        ]  # pip freeze leaves it out
    }
    assert {"torch", "onnx", "dvc", "dvc-s3", "kfp", "kfp-kubernetes"} <= set(cpu)
    assert not {"pytest", "mypy", "ruff", "pip"} & set(cpu)


@pytest.mark.parametrize("ort", ["cpu", "gpu"])
def test_the_server_s_image_has_the_versions_that_are_tested_and_no_torch(ort: str) -> None:
    tested = pins(ROOT / "constraints.txt")
    found = pins(ROOT / f"requirements/serve-{ort}.txt")
    runtime = found.pop("onnxruntime" if ort == "cpu" else "onnxruntime-gpu")
    assert ort == "gpu" or runtime == tested["onnxruntime"]
    assert {name: version for name, version in found.items() if tested.get(name) != version} == {}
    assert {"starlette", "uvicorn", "pillow", "numpy", "onnx"} <= set(found)
    assert not {"torch", "onnxscript", "kfp", "dvc", "onnxruntime", "onnxruntime-gpu"} & set(found)
