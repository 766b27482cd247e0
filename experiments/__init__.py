"""Studies on accuracy, and the scripts that draw the pictures in docs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from reptile.cpus import settle_threads
from reptile.errors import ReptileError
from reptile.files import write_json

settle_threads()  # before any module here loads torch


def run(main: Callable[..., Any]) -> None:
    """Run a script's `main`; a foreseeable mistake is one line and its kind's exit code."""
    try:
        typer.run(main)
    except ReptileError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def kept(file: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return what `keep` wrote for the same arguments of a study; None if it did not."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found if found.get("asked") == asked else None


def keep(file: Path, asked: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Write what was measured to a file, with the arguments it depends on; return both."""
    found = {"asked": asked, **measured}
    write_json(file, found)
    return found
