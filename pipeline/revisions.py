"""Which commit and which data a run is made of, asked of git.

Commits that change neither code nor data are passed over, so that they do not spoil the cache.
"""

import subprocess
from pathlib import Path
from typing import NamedTuple

import yaml

from reptile.errors import InputError
from reptile.provenance import STAGES

DATA_FILE = "data.dvc"
CODE = ("components", *sorted({f"reptile/{path}" for stage in STAGES.values() for path in stage}))
"""What a pod runs, as far as its results depend on it."""


class Pinned(NamedTuple):
    """Data at a revision: the commit that put it there ("" for a working tree), and its hash."""

    revision: str
    md5: str


def pinned_data(clone: Path, revision: str) -> Pinned:
    """Return the data that a clone pins at a revision, or in its working tree for ""."""
    if not revision:
        return Pinned("", data_md5(_read(clone / DATA_FILE)))
    commit = _git(clone, "log", "-1", "--format=%H", revision, "--", DATA_FILE)
    if not commit:
        raise InputError(f"{clone} has no {DATA_FILE} at {revision}; name a revision that has it")
    return Pinned(commit, data_md5(_git(clone, "show", f"{commit}:{DATA_FILE}")))


def code_commit(clone: Path) -> str:
    """Return the commit that last changed the code, with `-dirty` if it has changed since."""
    commit = _git(clone, "log", "-1", "--format=%H", "--", *CODE)
    changed = _git(clone, "status", "--porcelain", "--", *CODE)
    return f"{commit}-dirty" if changed else commit


def data_md5(text: str) -> str:
    """Return the hash of the data from the text of its .dvc file."""
    return str(yaml.safe_load(text)["outs"][0]["md5"])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name the folder of a clone") from None


def _git(clone: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(clone), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"git {' '.join(arguments)} in {clone}: {done.stderr.strip()}")
    return done.stdout.strip()
