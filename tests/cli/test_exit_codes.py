"""Each exit code, where it is met; docs/cli.md has all codes and commands."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from pipeline.__main__ import app as pipeline_app
from reptile import errors
from reptile.cli import app

NO_CUDA = {"CUDA_VISIBLE_DEVICES": ""}
ALONE = {"WORLD_SIZE": "2", "RANK": "0"}
"""One of two processes, without the address at which torchrun would have them meet."""

OVERSHOOTING = (
    *("-S", "train.meta_step=100", "-S", "train.meta_step_final=100"),
    *("-S", "train.optimizer.weight_decay=0.1"),
)

FAILURES: dict[str, tuple[list[str], int, str]] = {
    "a setting out of range": (["train", "-S", "train.ways=1"], 2, "train.ways"),
    "a command that is not there": (["trian"], 2, "trian"),
    "a gate above the accuracy": (["export", "-S", "export.gate.accuracy=1.0"], 3, "1.0"),
    # Each meta-step makes the weights nearly a hundred times as large, of the other sign.
    "a meta-step that overshoots": (
        ["train", *OVERSHOOTING, "-S", "train.meta_iterations=30"],
        4,
        "lower train.optimizer.learning_rate",
    ),
    "a changed graph": (["verify"], 5, "SHA-256"),
}
PROCESSES: dict[str, tuple[list[str], dict[str, str], int, str]] = {
    "a command that is not there": (["trian"], {}, 2, "trian"),
    "no CUDA device": (["train", "-S", "train.device=cuda"], NO_CUDA, 6, "train.device"),
    "no other process": (["train", "-S", "train.seed=1"], ALONE, 6, "torchrun"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_ends_with_the_code_of_its_class(
    failure: str, here: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    graph = here / "artifacts/bundle/adapt/1/model.onnx"
    if failure == "a changed graph":
        content = bytearray(graph.read_bytes())
        content[len(content) // 2] ^= 1
        graph.write_bytes(content)
    arguments, expected, words = FAILURES[failure]
    code, _, said = run(*arguments)
    assert code == expected, said
    assert words in said
    assert "Traceback" not in said


@pytest.mark.parametrize("failure", PROCESSES)
def test_a_process_ends_with_the_code(failure: str, here: Path, root: Path) -> None:
    arguments, environment, code, words = PROCESSES[failure]
    done = subprocess.run(
        [sys.executable, "-m", "reptile", *arguments],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(root)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_document_has_the_code_of_each_class(root: Path) -> None:
    text = (root / "docs/cli.md").read_text()
    documented = {
        name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.M)
    }
    classes: list[type[errors.ReptileError]] = [errors.ReptileError]
    classes += errors.ReptileError.__subclasses__()
    assert documented == {each.__name__: each.exit_code for each in classes}


@pytest.mark.parametrize(
    ("program", "typer_app"), [("reptile", app), ("python -m pipeline", pipeline_app)]
)
def test_the_document_has_each_command_with_an_example(
    program: str, typer_app: typer.Typer, root: Path
) -> None:
    text = (root / "docs/cli.md").read_text().split(f"\n## `{program}`\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w -]+)` \| .* \| `(.+)` \|$", text, re.M))
    assert set(rows) == set(commands(typer.main.get_command(typer_app)))
    for name, example in rows.items():
        assert f"{example} ".startswith(f"{program} {name} "), example


def commands(command: object, prefix: str = "") -> list[str]:
    """Return the names of all commands, those of groups with the group's before."""
    below = getattr(command, "commands", {})
    if not below:
        return [prefix.strip()]
    return [name for key, each in below.items() for name in commands(each, f"{prefix} {key}")]
