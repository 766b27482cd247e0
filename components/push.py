"""Putting a bundle into a DVC remote, so that any clone can pull it by its pointer.

Works without a repository: the pointer is handed back, and whoever keeps versions commits it.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from components import secrets
from reptile.errors import InputError


def publish(bundle: Path, remote: str, pointer: Path, secret: Path = secrets.DATA) -> None:
    """Push a bundle to a DVC remote and write its .dvc file.

    The same bundle gives the same pointer, and is stored once. Credentials come from the mounted
    secret, which DVC alone is given; without it, from where DVC's remotes look for them.

    Args:
        bundle: folder of the bundle.
        remote: address of the DVC remote, such as `s3://models/reptile`, or an absolute path.
        pointer: the .dvc file to write; it names the bundle `bundle`.
        secret: folder with the remote's credentials.

    Raises:
        InputError: the remote does not take it.
    """
    with tempfile.TemporaryDirectory(prefix="reptile-publish-") as folder:
        shutil.copytree(bundle, Path(folder) / "bundle")
        _dvc(folder, "init", "--no-scm")
        _dvc(folder, "config", "core.analytics", "false")
        _dvc(folder, "remote", "add", "--default", "there", remote)
        secrets.configure_remotes(Path(folder) / ".dvc", secret)
        _dvc(folder, "add", "bundle")
        _dvc(folder, "push")
        pointer.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(folder) / "bundle.dvc", pointer)


def _dvc(folder: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "dvc", *arguments, "--quiet"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"dvc {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
