"""Trained on × tested on: the same scores as an evaluation of its own, and no leak."""

import json
import shutil
from pathlib import Path

import pytest
from patterns import draw_letters

from reptile import cli, stages
from reptile.errors import InputError
from reptile.evaluate.metrics import read_metrics
from reptile.experiments.transfer import transfer_runs
from reptile.settings import EvaluateSettings, PrepareSettings, TrainSettings

TEST = EvaluateSettings(tasks=6, shots=(1,), steps=3)


def make_run(source: Path, folder: Path, split_seed: int = 0, size: int = 14) -> Path:
    prepare = {
        "source": str(source),
        "cross_domain": ["digits"],
        "image_size": size,
        "split_seed": split_seed,
        "test": 2,
        "rotations": False,
        "images_per_class": 6,
    }
    train = {
        "model": {"filters": 8},
        "train_shots": 5,
        "meta_iterations": 3,
        "checkpoint_every": 3,
        "validation_tasks": 2,
    }
    stages.prepare(PrepareSettings.model_validate(prepare), folder / "prepared")
    stages.train(
        TrainSettings.model_validate(train),
        folder / "prepared",
        folder / "checkpoint",
        curves=folder / "curves",
        work=folder / "work",
    )
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs on two sources, the second the first with other names."""
    folder = tmp_path_factory.mktemp("runs")
    draw_letters(folder / "letters")
    shutil.copytree(folder / "letters", folder / "signs")
    letters, signs = (
        make_run(folder / name, folder / f"run-{name}") for name in ("letters", "signs")
    )
    return letters, signs


def cells(output: Path) -> dict[tuple[str, str, str, str], float]:
    values = json.loads((output / "transfer.json").read_text())
    return {
        (cell["trained_on"], cell["tested_on"], cell["mode"], cell["start"]): cell["accuracy"]
        for cell in values["cells"]
    }


def test_each_cell_is_what_an_evaluation_of_its_own_gives(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    letters, _ = runs
    extra = letters / "prepared/cross_domain/digits"
    text = transfer_runs(TEST, runs, [extra], tmp_path / "table", "frozen")
    found = cells(tmp_path / "table")
    assert len(found) == 2 * 3 * 3 * 2
    stages.evaluate(TEST, letters / "prepared", letters / "checkpoint", tmp_path / "evaluation")
    metrics = read_metrics(tmp_path / "evaluation")
    for dataset in ("letters", "digits"):
        for mode in ("transductive", "non_transductive", "frozen"):
            for start in ("trained", "random"):
                mean = metrics.score(dataset, 1, start, mode).mean
                assert found["letters", dataset, mode, start] == pytest.approx(mean, abs=1e-5)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| trained on | tested on letters | tested on signs | tested on digits |"
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "letters",
        "signs",
        "nothing (random start of letters)",
    ]


def test_another_split_of_the_training_data_is_not_tested_on(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    letters, signs = runs
    other = make_run(letters.parent / "letters", tmp_path / "other", split_seed=3)
    text = transfer_runs(TEST, [letters, signs], [other / "prepared"], tmp_path / "table")
    column = f"letters ({other / 'prepared'})"
    assert {row for row, tested_on, *_ in cells(tmp_path / "table") if tested_on == column} == {
        "signs"
    }
    assert "| – |" in text
    assert "A dash" in text


def test_images_of_another_shape_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    letters, _ = runs
    larger = make_run(letters.parent / "signs", tmp_path / "larger", size=20)
    with pytest.raises(InputError, match="image_size"):
        transfer_runs(TEST, [letters], [larger / "prepared"], tmp_path / "table")


def test_the_command_prints_the_table(
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("evaluate: {tasks: 6, shots: [2], steps: 3}")
    words = ["transfer", *map(str, runs), "--mode", "frozen"]
    monkeypatch.setattr("sys.argv", ["reptile", *words])
    with pytest.raises(SystemExit) as stop:
        cli.run()
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "5-way 2-shot accuracy, %, batch norm frozen" in printed
    assert (tmp_path / "artifacts/transfer/transfer.md").read_text() in printed
