"""Cloning a private git repository with a key or a token that is mounted as a file.

By libgit2, which is given the credentials in memory and checks the host's key; the image needs
neither git nor ssh.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from reptile.errors import InputError

KEY, HOSTS = "ssh-privatekey", "known_hosts"
"""A secret's keys for SSH; the first is that of Kubernetes' type kubernetes.io/ssh-auth."""
USER, TOKEN = "username", "password"
"""A secret's keys for HTTPS, as in Kubernetes' type kubernetes.io/basic-auth."""


def clone_with(
    credentials: Mapping[str, str], secret: Path, address: str, revision: str, folder: Path
) -> None:
    """Clone a repository and check a revision out.

    Args:
        credentials: the mounted secret's values by their keys.
        secret: the folder that they are from.
        address: https:// or SSH.
        revision: commit, tag or branch; empty for the default branch.
        folder: an empty folder.

    Raises:
        InputError: the credentials do not fit the address, or there is no such revision.
    """
    import pygit2

    parts = urlsplit(address)
    offered: Any = None
    if parts.scheme == "ssh" or re.match(r"[^/]+@[^/]+:", address):
        if KEY not in credentials or HOSTS not in credentials:
            raise InputError(
                f"{address}: the git secret needs {KEY} and {HOSTS} for SSH; `ssh-keyscan HOST` "
                f"prints the second, to be compared with the host's published key"
            )
        user = parts.username if parts.scheme else address.partition("@")[0]
        offered = pygit2.Keypair(user or "git", None, str(secret / KEY), "")
    elif parts.scheme in ("https", "http"):
        if TOKEN not in credentials:
            raise InputError(f"{address}: the git secret needs {TOKEN}, a token, for HTTPS")
        if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise InputError(f"{address}: a token is not sent over plain http; use https://")
        offered = pygit2.UserPass(credentials.get(USER) or "git", credentials[TOKEN])

    class Once(pygit2.RemoteCallbacks):
        """Offers the credentials once: libgit2 asks again after a refusal, without end."""

        def credentials(self, *_: object) -> Any:
            nonlocal offered
            if offered is None:
                raise InputError(f"{address}: refused the credentials of the git secret")
            offer, offered = offered, None
            return offer

        def certificate_check(self, certificate: None, valid: bool, host: bytes) -> bool:
            # pygit2 accepts any SSH host unless this says what libgit2 has found.
            return valid

    before: Any = pygit2.settings.homedir
    with TemporaryDirectory(prefix="reptile-git-") as home:  # where libgit2 looks for known hosts
        if HOSTS in credentials:
            (Path(home) / ".ssh").mkdir()
            (Path(home) / ".ssh/known_hosts").write_text(credentials[HOSTS] + "\n")
        pygit2.settings.homedir = home
        try:
            clone = pygit2.clone_repository(address, str(folder), callbacks=Once(), proxy=True)
        finally:
            pygit2.settings.homedir = before
    if revision:
        _check_out(clone, address, revision)
    clone.free()


def _check_out(clone: Any, address: str, revision: str) -> None:
    import pygit2

    for name in (f"origin/{revision}", revision):
        try:
            commit = clone.revparse_single(name).peel(pygit2.Commit)
        except (KeyError, ValueError):
            continue
        clone.checkout_tree(commit)
        clone.set_head(commit.id)
        return
    raise InputError(f"{address} has no revision {revision}")
