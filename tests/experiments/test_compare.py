"""Comparing learners: the budget, the scores of an evaluation of its own, paired, and reuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from patterns import draw_letters

from reptile import cli, stages
from reptile.data.dataset import load_prepared
from reptile.errors import InputError
from reptile.evaluate.measure import evaluate
from reptile.experiments.compare import Budget, compare, forget_peak_memory, peak_memory
from reptile.experiments.comparisons import FOLDER, load_comparison
from reptile.learn.checkpoint import load_checkpoint
from reptile.settings import PrepareSettings

FILE = """
prepare: {source: SOURCE, cross_domain: [], image_size: 14, test: 2, rotations: false,
          images_per_class: 6}
train: {model: {name: mlp, hidden: [8]}, ways: 3, train_shots: 3, inner_steps: 2, inner_batch: 3,
        meta_batch: 2, validation_tasks: 2}
evaluate: {tasks: 6, shots: [1], steps: 3}
ways: 3
learners:
  reptile: {published: "97.68"}
  anil: {train: {optimizer: {name: sgd, learning_rate: 0.1}, episode: {queries: 2}}}
  protonet: {train: {episode: {shots: [1], queries: 2}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    draw_letters(folder / "letters")
    (folder / "small.yaml").write_text(FILE.replace("SOURCE", str(folder / "letters")))
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> str:
    comparison = load_comparison(str(folder / "small.yaml"))
    return compare(comparison, (), 1, Budget(None, 40), folder / "out")


def cells(folder: Path) -> dict[str, dict[str, object]]:
    found = json.loads((folder / "out/result.json").read_text())["cells"]
    return {cell["learner"]: cell for cell in found}


def test_all_use_the_same_number_of_gradients(folder: Path, table: str) -> None:
    found = cells(folder)
    used = {name: cell["gradients"] for name, cell in found.items()}
    assert used == {"reptile": 40, "anil": 40, "protonet": 40}
    trained = {name: cell["train"]["meta_iterations"] for name, cell in found.items()}  # type: ignore[index]
    assert trained == {"reptile": 10, "anil": 4, "protonet": 20}  # of 4, 10 and 2 gradients each


def test_a_cell_is_what_an_evaluation_of_its_own_gives(folder: Path, table: str) -> None:
    comparison = load_comparison(str(folder / "small.yaml"))
    data = load_prepared(folder / "out/prepared")
    for name in ("reptile", "anil", "protonet"):
        checkpoint = load_checkpoint(folder / "out" / name / "seed-0/checkpoint")
        result = evaluate(
            comparison.evaluation(name), checkpoint, data, {}, ways=3, baselines=False
        )
        wanted = result.held_out[0].scores("trained", "transductive")
        own = cells(folder)[name]["scores"]["1"]["3"]  # type: ignore[index]
        np.testing.assert_allclose(own, wanted, atol=1e-6)


def test_differences_are_paired(folder: Path, table: str) -> None:
    ours, theirs = (
        np.array(cells(folder)[name]["scores"]["1"]["3"])  # type: ignore[index]
        for name in ("anil", "reptile")
    )
    row = next(line for line in table.splitlines() if line.startswith("| `anil`"))
    off = ours - theirs
    half = 1.96 * off.std(ddof=1) / 6**0.5
    text = f"{100 * off.mean():.1f} ± {100 * half:.1f}".replace("-", "\N{MINUS SIGN}")
    assert row.split("|")[3].strip() == text
    assert "97.68" in table


def test_a_finished_cell_is_not_trained_again(
    folder: Path, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    whole = stages.train
    monkeypatch.setattr(
        stages, "train", lambda *given, **more: trained.append(given) or whole(*given, **more)
    )
    comparison = load_comparison(str(folder / "small.yaml"))
    assert compare(comparison, (), 1, Budget(None, 40), folder / "out") == table
    assert trained == []
    compare(comparison, ["protonet"], 2, Budget(None, 40), folder / "out")
    assert [settings.seed for settings, *_ in trained] == [1]


def test_a_budget_of_seconds_is_kept_about(folder: Path) -> None:
    comparison = load_comparison(str(folder / "small.yaml"))
    compare(comparison, ["reptile"], 1, Budget(0.5, None), folder / "timed", data=None)
    (cell,) = json.loads((folder / "timed/result.json").read_text())["cells"]
    assert cell["train"]["meta_iterations"] > 3
    assert 0.05 < cell["seconds"] < 10  # a machine may be busy
    drawn = (folder / "timed/curves.svg").read_text()
    assert "over seconds" in drawn
    assert "over gradients" in drawn


def test_mistakes_are_refused(folder: Path) -> None:
    comparison = load_comparison(str(folder / "small.yaml"))
    for learners, budget, message in (
        (["mamll"], Budget(1, None), "use reptile, anil, protonet"),
        ([], Budget(None, None), "--seconds or --gradients"),
        ([], Budget(1, 1), "--seconds or --gradients"),
        ([], Budget(None, 1), "a meta-iteration of reptile, seed 0 takes 4"),
    ):
        with pytest.raises(InputError, match=message):
            compare(comparison, learners, 1, budget, folder / "out")
    with pytest.raises(InputError, match="did you mean omniglot"):
        load_comparison("omniglott")
    wrong = folder / "wrong.yaml"
    wrong.write_text("learners: {reptile: {train: {meta_batches: 3}}}")
    with pytest.raises(InputError, match=r"learners.reptile.train: meta_batches: no such setting"):
        compare(load_comparison(str(wrong)), (), 1, Budget(1, None), folder / "out")


@pytest.mark.parametrize("path", FOLDER.glob("*.yaml"), ids=lambda path: path.stem)
def test_the_files_are_valid(path: Path) -> None:
    comparison = load_comparison(path.stem)
    for name in comparison.learners:
        assert comparison.training(name).algorithm == name
        comparison.evaluation(name)
    assert isinstance(comparison.prepare, PrepareSettings)


def test_the_peak_of_memory_starts_anew() -> None:
    before = peak_memory()
    if before is None:
        pytest.skip("only Linux tells")
    block = np.ones(30 * 2**20, dtype=np.uint8)
    with_block = peak_memory()
    assert with_block is not None
    assert with_block - before > 10 * 2**20 or before > with_block - block.nbytes
    del block
    forget_peak_memory()
    after = peak_memory()
    assert after is not None
    assert after < with_block


def test_the_command_prints_the_table(
    folder: Path, table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(folder / "small.yaml"), "--gradients", "40"]
    monkeypatch.setattr("sys.argv", ["reptile", *words, "--artifacts", str(folder / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.run()
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "| `protonet` |" in printed
