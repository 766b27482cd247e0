"""A folder in which the tiny pipeline has run, and commands run in this process."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from patterns import draw_letters

from reptile import cli

TINY = """
prepare: {{source: {source}, image_size: 14, validation: 0.2, test: 0.2, images_per_class: 6}}
train:
  model: {{filters: 8}}
  train_shots: 5
  inner_steps: 3
  inner_batch: 5
  meta_batch: 2
  meta_iterations: 6
  checkpoint_every: 3
  validation_tasks: 2
evaluate: {{tasks: 6, shots: [1, 2], steps: 5}}
export: {{gate: {{insist: true}}}}
verify: {{tasks: 40, steps: 5}}
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command; return its exit code and what it wrote to stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["reptile", *map(str, arguments)])
        try:
            cli.run()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole tiny pipeline has run."""
    folder = tmp_path_factory.mktemp("pipeline")
    draw_letters(folder / "letters")
    (folder / "params.yaml").write_text(TINY.format(source=folder / "letters"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for stage in ("prepare", "train", "evaluate", "export", "verify"):
            monkeypatch.setattr("sys.argv", ["reptile", stage])
            with pytest.raises(SystemExit) as stop:
                cli.run()
            assert not stop.value.code, stage
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished folder of one's own, as the working folder."""
    copy = tmp_path / "here"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy
