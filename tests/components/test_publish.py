"""A published bundle comes back from the remote by its pointer, byte for byte."""

import subprocess
import sys
from pathlib import Path

import pytest

from components.push import publish
from reptile.errors import InputError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    (folder / "adapt/1").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "adapt/1/model.onnx").write_bytes(bytes(range(256)))
    return folder


def test_a_clone_pulls_what_was_published(bundle: Path, tmp_path: Path) -> None:
    remote, pointer = tmp_path / "remote", tmp_path / "out/pointer"
    publish(bundle, str(remote), pointer)
    first = pointer.read_bytes()
    stored = {path for path in remote.rglob("*") if path.is_file()}
    publish(bundle, str(remote), pointer)
    assert pointer.read_bytes() == first
    assert {path for path in remote.rglob("*") if path.is_file()} == stored

    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "bundle.dvc").write_bytes(first)
    for command in (
        ("init", "--no-scm"),
        ("remote", "add", "--default", "team", str(remote)),
        ("pull",),
    ):
        subprocess.run([sys.executable, "-m", "dvc", *command, "--quiet"], cwd=clone, check=True)
    for path in (p for p in bundle.rglob("*") if p.is_file()):
        assert (clone / "bundle" / path.relative_to(bundle)).read_bytes() == path.read_bytes()


def test_a_remote_that_takes_nothing_is_an_error(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "remote").write_text("a file")
    with pytest.raises(InputError, match="dvc push"):
        publish(bundle, str(tmp_path / "remote"), tmp_path / "pointer")
    assert not (tmp_path / "pointer").exists()
