"""Sweeps: which candidates there are, and a small one run to its end by kfp's local runner."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from pipeline.local import Outcome, examine
from pipeline.sweep import candidates
from reptile.errors import InputError
from reptile.learn.checkpoint import load_checkpoint
from reptile.runtime import FewShotModel
from reptile.settings import load_settings


@pytest.fixture
def params(root: Path) -> Path:
    return root / "params.yaml"


def test_candidates_are_all_combinations_in_the_order_of_the_values(params: Path) -> None:
    found = candidates(
        params,
        ["train.meta_step=0.5,1.0", "train.model={name: conv4, filters: 8}", "train.seed=3,0"],
    )
    assert [(c.train.meta_step, c.train.seed) for c in found] == [
        (0.5, 3),
        (0.5, 0),
        (1.0, 3),
        (1.0, 0),
    ]
    assert {c.train.model.filters for c in found} == {8}
    others = {c.model_copy(update={"train": found[0].train}) for c in found}
    assert len(others) == 1, "they share everything but training"


def test_a_list_is_one_value_and_the_same_candidate_is_one(params: Path) -> None:
    found = candidates(params, ["evaluate.shots=[1,5]", "train.seed=0,1,0"])
    assert [c.train.seed for c in found] == [0, 1]
    assert found[0].evaluate.shots == (1, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "two candidates or more"),
        (["train.seed=1"], "two candidates or more"),
        (["train.seed=1,1"], "two candidates or more"),
        (["evaluate.steps=5,50", "train.seed=0,1"], "varies settings of `train`"),
        (["train.seed=0,1", "prepare.validation=0"], "chooses by the validation split"),
        (["train.seed=0,-1"], "train.seed"),
        (["train.sed=0,1"], "no such setting"),
        (["train.seed"], "stage.setting=value"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_sentence(
    params: Path, changes: list[str], words: str
) -> None:
    with pytest.raises(InputError) as error:
        candidates(params, changes)
    assert words in str(error.value)


@pytest.fixture(scope="module")
def swept(clone: Path) -> tuple[str, Path]:
    """A sweep of three that ended well: what was printed, and its folder."""
    command = [sys.executable, "-m", "pipeline", "sweep", "--local"]
    done = subprocess.run(
        [*command, "-S", "train.meta_iterations=3,6,9", "-S", "train.checkpoint_every=3"],
        cwd=clone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, max((clone / "artifacts/kubeflow").iterdir())


@pytest.mark.slow
def test_the_best_by_validation_is_evaluated_once_and_delivered(swept: tuple[str, Path]) -> None:
    printed, folder = swept
    assert "3 candidates" in printed
    trained = {
        path: load_checkpoint(path).info for path in folder.glob("for-loop-*/train/checkpoint")
    }
    assert sorted(info.settings.meta_iterations for info in trained.values()) == [3, 6, 9]
    best = max(info.curve[-1].score for info in trained.values())
    chosen = load_checkpoint(folder / "choose/best").info
    assert chosen.curve[-1].score == best
    (source,) = (path for path, info in trained.items() if info == chosen)
    ours, theirs = (
        load_file(path / "weights.safetensors") for path in (source, folder / "choose/best")
    )
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert len(list(folder.glob("**/metrics.json"))) == 1, "one evaluation on the test split"
    FewShotModel.load(folder / "export/bundle").check()
    manifest = json.loads((folder / "export/bundle/manifest.json").read_text())
    assert str(chosen.settings.meta_iterations) in json.dumps(manifest)
    run = examine(folder)
    assert run.outcome is Outcome.DELIVERED
    (line,) = (result.found for result in run.results if result.stage == "train")
    assert line.count("\n") == 3, "a row for each candidate, and the best"


def test_the_settings_of_a_candidate_are_those_of_one_run_alone(params: Path) -> None:
    (_, second) = candidates(params, ["train.optimizer.learning_rate=0.001,0.01"])
    assert second == load_settings(params, ["train.optimizer.learning_rate=0.01"])
