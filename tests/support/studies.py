"""A script's `main`, run as by its command line."""

from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.testing import CliRunner


def run_study(main: Callable[..., Any], words: Sequence[str]) -> str:
    """Run a study of `experiments`; return what it printed."""
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output
