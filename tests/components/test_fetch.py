"""Data fetched by DVC: what was asked for, or an error that says why not."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.fetch import content_md5, fetch
from reptile.errors import InputError


def run(folder: Path, *command: str) -> str:
    program = Path(sys.executable).parent / command[0]
    name = str(program) if program.is_file() else command[0]
    done = subprocess.run(
        [name, *command[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module", params=["default remote", "remote of the data"])
def repository(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone whose data has two versions; its remote lies inside it, as this project's does."""
    default = ("--default",) if request.param == "default remote" else ()
    folder = tmp_path_factory.mktemp("repository")
    run(folder, "git", "init", "--quiet", "--initial-branch=main")
    for name, value in (("user.name", "Test"), ("user.email", "test@example.org")):
        run(folder, "git", "config", name, value)
    run(folder, "dvc", "init", "--quiet")
    run(folder, "dvc", "remote", "add", "--quiet", *default, "near", ".dvc/near")
    for version in ("first", "second"):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / "letters.txt").write_text(version)
        run(folder, "dvc", "add", "--quiet", "data")
        if not default and version == "first":  # `dvc add` keeps it
            with (folder / "data.dvc").open("a") as pointer:
                pointer.write("  remote: near\n")
        run(folder, "dvc", "push", "--quiet", "--remote", "near")
        run(
            folder,
            "git",
            "add",
            "--all",
            "--force",
            "data.dvc",
            ".gitignore",
            ".dvc/config",
            ".dvc/near",
        )
        run(folder, "git", "commit", "--quiet", "--message", version)
        run(folder, "git", "tag", version)
    shutil.rmtree(folder / ".dvc/cache")
    shutil.rmtree(folder / "data")
    return folder


def pinned(repository: Path, revision: str) -> str:
    text = run(repository, "git", "show", f"{revision}:data.dvc")
    return str(yaml.safe_load(text)["outs"][0]["md5"])


@pytest.mark.parametrize("address", ["{}", "file://{}"], ids=["folder", "address"])
@pytest.mark.parametrize("revision", ["first", "second"])
def test_the_revision_asked_for_comes(
    repository: Path, tmp_path: Path, address: str, revision: str
) -> None:
    md5 = pinned(repository, revision)
    fetch(address.format(repository), revision, "data", md5, tmp_path)
    assert (tmp_path / "data/letters.txt").read_text() == revision
    assert content_md5(tmp_path / "data") == md5
    assert run(repository, "git", "status", "--short") == ""


def test_what_only_a_clone_s_cache_has_comes_too(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    run(copy, "dvc", "fetch", "--quiet")
    shutil.rmtree(copy / ".dvc/near")
    fetch(str(copy), "second", "data", pinned(repository, "second"), tmp_path / "there")
    assert (tmp_path / "there/data/letters.txt").read_text() == "second"


def test_a_clones_working_tree_may_be_asked_for(repository: Path, tmp_path: Path) -> None:
    fetch(str(repository), "", "data", pinned(repository, "second"), tmp_path)
    assert (tmp_path / "data/letters.txt").read_text() == "second"


def test_data_changed_after_dvc_add_is_refused(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    (copy / "data").mkdir()
    (copy / "data/letters.txt").write_text("changed by hand")
    with pytest.raises(InputError, match="content that came"):
        fetch(str(copy), "", "data", pinned(repository, "second"), tmp_path / "there")


MISTAKES = {
    "another version's md5": ({"revision": "first"}, "the repository has"),
    "no such revision": ({"revision": "third"}, "third"),
    "no such path": ({"path": "dada"}, "dada"),
    "a path that git tracks": ({"path": "data.dvc"}, "no hash by DVC"),
    "no such repository": ({"repository": "/no/such/place"}, "/no/such/place"),
    "a password in the address": ({"repository": "https://me:secret@host/x.git"}, "credential"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_that_names_it(
    repository: Path, tmp_path: Path, mistake: str
) -> None:
    change, words = MISTAKES[mistake]
    asked: dict[str, Any] = {"repository": str(repository), "revision": "second", "path": "data"}
    asked |= change
    with pytest.raises(InputError) as error:
        fetch(**asked, md5=pinned(repository, "second"), folder=tmp_path)
    assert words in str(error.value)
    assert "secret" not in str(error.value)
    assert not list(tmp_path.rglob("letters.txt"))


def test_a_remote_without_the_data_is_an_error(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    shutil.rmtree(copy / ".dvc/near")
    with pytest.raises(InputError, match="cannot be fetched") as error:
        fetch(str(copy), "second", "data", pinned(repository, "second"), tmp_path / "there")
    assert ".dvc/near" in str(error.value), "the reason is DVC's own"
