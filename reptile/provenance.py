"""Where an artifact came from: hashes and versions that go into it.

Everything here is a function of the code and its packages, never of the time or the machine, so
that the same inputs give the same artifact byte for byte.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any


def code_sha256() -> str:
    """Return the hash of this package's source files, whatever commit they are from."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in {".py", ".cpp", ".h", ".html"}:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def settings_sha256(settings: Any) -> str:
    """Return the hash of plain (JSON) settings, whatever order they stand in."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of the packages that shaped an artifact."""
    return {package: version(package) for package in packages}
