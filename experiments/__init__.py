"""Studies on accuracy, and the scripts that draw the pictures in docs."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from reptile.cpus import settle_threads
from reptile.errors import ReptileError

settle_threads()  # before any module here loads torch


def run(main: Callable[..., Any]) -> None:
    """Run a script's `main`; a foreseeable mistake is one line and its kind's exit code."""
    try:
        typer.run(main)
    except ReptileError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
