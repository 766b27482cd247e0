"""Fetching a dataset that DVC versions: one path, at one revision, of one repository.

For a machine that has no clone, such as a pod. `prepare` reads the files.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components import secrets
from components.clone import clone_with
from reptile.errors import InputError


def fetch(
    repository: str,
    revision: str,
    path: str,
    md5: str,
    folder: Path,
    data_secret: Path = secrets.DATA,
    git_secret: Path = secrets.GIT,
) -> None:
    """Fetch `path` of a DVC repository to `folder / path`, and check that it is what it should be.

    Credentials come from the mounted secrets, which DVC and git alone are given; without them, from
    where DVC and git take them (environment, configuration, credential helper). Never from the
    address.

    Args:
        repository: a git address, or the folder of a clone.
        revision: a commit, tag or branch; "" for a clone's working tree.
        path: a file or folder that DVC tracks, relative to the repository's root.
        md5: the hash that DVC knows it by, as the .dvc file has it (`….dir` for a folder).
        folder: where to put it.
        data_secret: folder with the credentials of the DVC remote, for an address.
        git_secret: folder with the credentials of the git repository, for an address.

    Raises:
        InputError: it cannot be had, or it is not what `md5` says.
    """
    from dvc.api import DVCFileSystem

    if re.match(r"\w+://[^/@]*:[^/@]*@", repository):
        raise InputError(
            "the repository's address holds a password; leave it out of the address, and give it "
            "to git as a credential"
        )
    what = f"{path} of {repository}" + (f" at {revision}" if revision else "")
    target = folder / path
    try:
        with _clone(repository, revision, data_secret, git_secret) as (clone, at):
            files = DVCFileSystem(clone, rev=at, config=_remotes(clone) if at else None)
            known = (files.info(path).get("dvc_info") or {}).get("md5", "no hash by DVC")
            if known != md5:
                raise InputError(_differs(what, f"the repository has {known}", md5))
            target.parent.mkdir(parents=True, exist_ok=True)
            files.get(path, str(target), recursive=True)
    except InputError:
        raise
    except Exception as error:  # DVC raises dozens of kinds, from its own to the remote's library
        reasons = [str(error), *(str(cause) for cause in _causes(error))]
        raise InputError(f"{what} cannot be fetched: {': '.join(filter(None, reasons))}") from error
    content = content_md5(target)
    if content != md5:
        raise InputError(_differs(what, f"the content that came has {content}", md5))


def content_md5(path: Path) -> str:
    """Return the hash by which DVC would know a file or folder (`….dir`) as it is now."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import LocalFileSystem
    from dvc_objects.fs.memory import MemoryFileSystem

    nowhere = HashFileDB(MemoryFileSystem(), "memory://nowhere")
    _, _, found = build(nowhere, str(path.absolute()), LocalFileSystem(), "md5", dry_run=True)
    return str(found.hash_info.value)


@contextmanager
def _clone(
    repository: str, revision: str, data_secret: Path, git_secret: Path
) -> Iterator[tuple[str, str | None]]:
    """Yield the folder of a clone, and the revision at which DVC is to look at it.

    DVC would clone by itself, but then does not find a remote that lies inside the repository.
    """
    from dvc.scm import Git

    if Path(repository).is_dir():
        yield repository, revision or None
        return
    with TemporaryDirectory(prefix="reptile-clone-") as folder:
        if credentials := secrets.read_secret(git_secret):
            clone_with(credentials, git_secret, repository, revision, Path(folder))
        else:
            Git.clone(repository, folder, rev=revision or None).close()
        secrets.configure_remotes(Path(folder) / ".dvc", data_secret)
        yield folder, None


def _remotes(clone: str) -> dict[str, Any]:
    """Return where a clone's remotes are, for DVC to use at any revision of it.

    By itself it does so for the default remote, and looks for others that lie inside the repository
    in the root folder.
    """
    from dvc.config import Config

    return {"core": {}, "remote": dict(Config(str(Path(clone).absolute() / ".dvc"))["remote"])}


def _causes(error: BaseException) -> Iterator[BaseException]:
    while cause := error.__cause__ or error.__context__:
        yield cause
        error = cause


def _differs(what: str, found: str, md5: str) -> str:
    return (
        f"{what}: {found}, the run asks for {md5}; take the revision and the md5 from the same "
        "commit's .dvc file"
    )
