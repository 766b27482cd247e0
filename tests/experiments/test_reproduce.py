"""Several seeds in one command: the interval over them, the table, and what is not done again."""

import json
import math
import shutil
from pathlib import Path

import pytest
from patterns import draw_letters

from reptile import cli
from reptile.evaluate.metrics import read_metrics
from reptile.experiments.presets import load_preset, preset_path
from reptile.experiments.reproduce import Reproduction, markdown, over_seeds, reproduce
from reptile.settings import load_settings

SMALL = (
    "prepare.image_size=14",
    "prepare.held_out=groups",
    "prepare.test=2",
    "prepare.images_per_class=6",
    "prepare.rotations=false",
    "train.model.filters=8",
    "train.train_shots=5",
    "train.inner_steps=2",
    "train.inner_batch=5",
    "train.meta_iterations=4",
    "train.checkpoint_every=2",
    "train.validation_tasks=2",
    "evaluate.tasks=6",
    "evaluate.steps=3",
)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "letters"
    draw_letters(folder)
    return folder


def run(letters: Path, folder: Path, seeds: int, *more: str) -> tuple[Reproduction, list[str]]:
    said: list[str] = []
    settings = load_settings(preset_path("omniglot-5w1s"), (*SMALL, *more))
    result = reproduce(
        load_preset("omniglot-5w1s"),
        settings,
        seeds,
        folder,
        data=str(letters),
        on_progress=lambda what, done, total: said.append(what),
    )
    return result, said


@pytest.fixture(scope="module")
def finished(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduced") / "two"
    run(letters, folder, 2)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of one's own of two finished seeds."""
    return Path(shutil.copytree(finished, tmp_path / "two"))


def test_the_interval_over_seeds_is_students() -> None:
    # Quantiles of t for 2 and 4 degrees of freedom, from a printed table.
    mean, interval = over_seeds([0.80, 0.82, 0.87])
    assert mean == pytest.approx(0.83)
    assert interval == pytest.approx(4.3027 * math.sqrt(0.0013) / math.sqrt(3), rel=1e-4)
    assert over_seeds([1, 2, 3, 4, 5]).interval == pytest.approx(
        2.7764 * math.sqrt(2.5 / 5), rel=1e-4
    )


def test_the_table_has_every_mode_beside_the_published_row_and_says_that_it_is_scaled_down(
    letters: Path, folder: Path
) -> None:
    result, _ = run(letters, folder, 2)
    text = (folder / "result.md").read_text()
    assert text == markdown(result)
    header, transductive, non_transductive, frozen = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and "---" not in line
    )
    assert "scaled down" in header[2]
    assert [row[1] for row in (transductive, non_transductive, frozen)] == [
        "transductive",
        "non-transductive",
        "frozen",
    ]
    assert (transductive[-1], non_transductive[-1], frozen[-1]) == (
        "97.68 ± 0.04",
        "95.39 ± 0.09",
        "–",
    )
    scores = [
        read_metrics(folder / f"seed-{seed}/evaluation")
        .score("letters", 1, "trained", "frozen")
        .mean
        for seed in (0, 1)
    ]
    assert scores[0] != scores[1] or result.seeds[0].curve != result.seeds[1].curve
    assert frozen[2].strip("*").startswith(f"{50 * sum(scores):.1f} ± ")
    assert "`train.meta_iterations` 4 (preset: 100,000)" in text
    assert "train.checkpoint_every" not in text, "this makes no other experiment"
    written = json.loads((folder / "result.json").read_text())
    assert [seed["seed"] for seed in written["seeds"]] == [0, 1]
    assert written["over_seeds"]["letters"]["1"]["frozen"]["mean"] == pytest.approx(sum(scores) / 2)


def test_what_is_finished_is_not_done_again_and_one_more_seed_is(
    letters: Path, folder: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("seed-*/checkpoint/*")}
    assert len(before) == 4
    assert run(letters, folder, 2)[1] == []
    said = set(run(letters, folder, 3)[1])
    assert said == {"seed 3 of 3: training", "seed 3 of 3: evaluating"}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_settings_are_another_run_and_another_test_does_not_train_again(
    letters: Path, folder: Path
) -> None:
    said = set(run(letters, folder, 1, "evaluate.tasks=8")[1])
    assert said == {"seed 1 of 1: evaluating"}
    said = set(run(letters, folder, 1, "evaluate.tasks=8", "train.inner_steps=3")[1])
    assert said == {"seed 1 of 1: training", "seed 1 of 1: evaluating"}
    said = set(run(letters, folder, 1, "train.inner_steps=3", "prepare.split_seed=4")[1])
    assert said == {"preparing", "seed 1 of 1: training", "seed 1 of 1: evaluating"}


def test_an_interrupted_seed_goes_on_and_ends_with_the_same_weights(
    letters: Path, folder: Path, tmp_path: Path
) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if "training" in what and done == 3:
            raise KeyboardInterrupt

    settings = load_settings(preset_path("omniglot-5w1s"), SMALL)
    preset, other = load_preset("omniglot-5w1s"), tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        reproduce(preset, settings, 1, other, data=str(letters), on_progress=kill)
    result, _ = run(letters, other, 1)
    assert result.seeds[0].training.first_iteration == 2
    assert "the part from iteration 2 on" in markdown(result)
    weights = "seed-0/checkpoint/weights.safetensors"
    assert (other / weights).read_bytes() == (folder / weights).read_bytes()


def test_the_command_takes_a_prepared_folder_too(
    letters: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = [word for change in SMALL for word in ("-S", change)]
    words = ["reproduce", "omniglot-5w1s", "--seeds", "1", *changes]
    place = ["--data", folder / "prepared", "--artifacts", tmp_path / "one"]
    monkeypatch.setattr("sys.argv", ["reptile", *map(str, [*words, *place])])
    with pytest.raises(SystemExit) as stop:
        cli.run()
    assert not stop.value.code
    assert "seed 0 ± 95 %, scaled down" in capsys.readouterr().out
    assert not (tmp_path / "one/prepared").exists()
    one, two = (
        (place / "seed-0/checkpoint/weights.safetensors").read_bytes()
        for place in (tmp_path / "one", folder)
    )
    assert one == two


def test_without_batch_norm_there_is_one_row(letters: Path, tmp_path: Path) -> None:
    result, _ = run(letters, tmp_path, 1, "train.model.name=mlp")
    rows = [line for line in markdown(result).splitlines() if line.startswith("| letters")]
    assert len(rows) == 1
    assert "| none |" in rows[0]
