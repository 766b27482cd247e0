"""Algorithms within one budget, on the same tasks: the table, its intervals, and what is reused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reptile import cli
from reptile.data.dataset import IMAGES_FILE, INDEX_FILE, PreparedData, load_prepared
from reptile.data.prepare import prepare
from reptile.errors import InputError
from reptile.experiments.compare import Budget, Comparison, compare, gradients, settings_of
from reptile.files import write_json
from reptile.settings import PrepareSettings, Settings

SMALL: dict[str, Any] = {
    "train": {
        "engine": "eager",
        "device": "cpu",
        "model": {"filters": 4},
        "ways": 3,
        "train_shots": 4,
        "inner_steps": 2,
        "inner_batch": 4,
        "meta_batch": 2,
        "validation_tasks": 2,
    },
    "evaluate": {"tasks": 8, "steps": 2, "shots": [1, 2]},
}
FEW: dict[str, Any] = {
    "maml": {"train": {"meta_batch": 2}},
    "ridge": {"train": {"ways": 4}},
}
NAMES = ("reptile", "maml", "ridge")
BUDGET = Budget(gradients=200)


@pytest.fixture(scope="module")
def prepared(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "prepared"
    folder.mkdir()
    np.save(folder / IMAGES_FILE, data.images)
    write_json(folder / INDEX_FILE, data.index.model_dump(mode="json"))
    return folder


def run(
    prepared: Path,
    folder: Path,
    seeds: int = 1,
    budget: Budget = BUDGET,
    changes: dict[str, Any] = FEW,
) -> tuple[Comparison, set[str]]:
    said = set()
    result = compare(
        Settings.model_validate(SMALL),
        NAMES,
        seeds,
        budget,
        prepared,
        folder,
        changes=changes,
        on_progress=lambda what, done, total: said.add(what),
    )
    return result, said


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("compared")
    return folder, run(prepared, folder, 2)[0]


def task_scores(folder: Path, name: str, seed: int, shots: int) -> np.ndarray:
    scores = json.loads((folder / name / f"seed-{seed}/evaluation/scores.json").read_text())
    by_mode = scores["scores"][str(shots)]
    return np.array(by_mode.get("none", by_mode.get("frozen")))


def test_every_training_takes_the_budget_and_no_more(finished: tuple[Path, Comparison]) -> None:
    _, result = finished
    assert [entry.algorithm for entry in result.entries] == list(NAMES)
    # reptile: 2 tasks of 2 steps of 4 images. maml: 2 tasks of one step of 3 images, counted twice,
    # and 3 x 5 queries. ridge: 4 classes of 1 or 2 shots and 5 queries.
    for entry, each in zip(result.entries, (16, 2 * (2 * 3 + 15), 26), strict=True):
        assert gradients(entry.settings.train) == each
        assert entry.settings.train.meta_iterations == 200 // each
        assert entry.gradients <= 200 < entry.gradients + each


def test_all_are_measured_on_the_same_tasks(finished: tuple[Path, Comparison]) -> None:
    _, result = finished
    digests = {cell.tasks_sha256 for entry in result.entries for cell in entry.cells}
    assert len(digests) == 1
    assert len({entry.settings.evaluate.steps for entry in result.entries}) == 2


def test_differences_are_paired_by_task_of_one_seed_and_by_seed_of_several(
    prepared: Path, finished: tuple[Path, Comparison]
) -> None:
    folder, two = finished
    one, _ = run(prepared, folder, 1)
    for shots in (1, 2):
        apart = task_scores(folder, "ridge", 0, shots) - task_scores(folder, "reptile", 0, shots)
        found = one.difference(one.entries[2], shots)
        assert found is not None
        assert found.mean == pytest.approx(apart.mean())
        assert found.interval == pytest.approx(1.96 * apart.std(ddof=1) / math.sqrt(len(apart)))

        means = [
            float(
                (
                    task_scores(folder, "ridge", s, shots)
                    - task_scores(folder, "reptile", s, shots)
                ).mean()
            )
            for s in (0, 1)
        ]
        found = two.difference(two.entries[2], shots)
        assert found is not None
        assert found.mean == pytest.approx(np.mean(means))
        # Student's t with one degree of freedom, from a printed table.
        assert found.interval == pytest.approx(12.706 * abs(means[0] - means[1]) / 2, rel=1e-4)


def test_the_files_say_what_the_result_is(
    prepared: Path, finished: tuple[Path, Comparison]
) -> None:
    folder, _ = finished
    result, _ = run(prepared, folder, 2)
    text = (folder / "result.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header[:5] == ["algorithm", "1-shot", "1-shot, transductive", "less reptile", "2-shot"]
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(NAMES)
    ridge = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert ridge[2] == "–", "a closed-form learner predicts each query alone"
    written = json.loads((folder / "result.json").read_text())
    assert written["version"] == 1
    assert written["algorithms"][2]["scores"]["1"]["frozen"]["mean"] == pytest.approx(
        np.mean([task_scores(folder, "ridge", seed, 1).mean() for seed in (0, 1)])
    )
    assert [len(each["seeds"]) for each in written["algorithms"]] == [2, 2, 2]
    page = (folder / "result.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("<polyline") == 2 * len(result.entries)


def test_what_is_finished_is_not_done_again(
    prepared: Path, finished: tuple[Path, Comparison], tmp_path: Path
) -> None:
    folder, _ = finished
    assert run(prepared, folder, 2)[1] == set()
    shutil.copytree(folder, tmp_path / "copy")
    other = FEW | {"maml": {"train": {"meta_batch": 1}}}
    _, said = run(prepared, tmp_path / "copy", 1, changes=other)
    assert said == {f"maml, seed 1 of 1: {what}" for what in ("training", "evaluating")}


def test_an_interrupted_training_resumes_to_the_same_weights(
    prepared: Path, finished: tuple[Path, Comparison], tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "ridge, seed 1 of 1: training" and done == 3:
            raise KeyboardInterrupt

    settings = Settings.model_validate(SMALL)
    with pytest.raises(KeyboardInterrupt):
        compare(settings, NAMES, 1, BUDGET, prepared, tmp_path, changes=FEW, on_progress=stop)
    result, said = run(prepared, tmp_path)
    assert said == {"ridge, seed 1 of 1: training"}
    assert result.entries[2].cells[0].training.first_iteration > 0
    weights = "ridge/seed-0/checkpoint/weights.safetensors"
    assert (tmp_path / weights).read_bytes() == (finished[0] / weights).read_bytes()


def test_a_budget_of_time_is_measured_once(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reptile.experiments.compare.TIMED_SECONDS", 0.1)
    first, _ = run(prepared, tmp_path, budget=Budget(seconds=0.5))
    again, said = run(prepared, tmp_path, budget=Budget(seconds=0.5))
    assert said == set()
    for one, two in zip(first.entries, again.entries, strict=True):
        timed = json.loads((tmp_path / one.algorithm / "timing.json").read_text())
        number = one.settings.train.meta_iterations
        assert number == int(0.5 / timed["seconds_per_iteration"])
        assert two.settings.train.meta_iterations == number


def test_values_are_compared_too(tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    prepare(
        PrepareSettings(source="sinusoid", cross_domain=(), images_per_class=50, test=0.16), folder
    )
    model = {"name": "mlp", "hidden": [8], "activation": "tanh"}
    sgd = {"name": "sgd", "learning_rate": 0.02, "state": "reset"}
    train = SMALL["train"] | {"model": model, "ways": 1, "optimizer": sgd}
    settings = Settings.model_validate(
        {"train": train, "evaluate": {"tasks": 4, "steps": 2, "shots": [5], "batch": 5}}
    )
    budget = Budget(gradients=5000)
    result = compare(settings, ("reptile", "maml", "bayes"), 1, budget, folder, tmp_path / "out")
    text = (tmp_path / "out/result.md").read_text()
    assert "transductive" not in text
    assert "Mean squared error" in text
    assert all(result.score(entry, 5, "frozen") for entry in result.entries)


@pytest.mark.parametrize(
    ("names", "changes", "budget", "message"),
    [
        (["reptile", "mamal"], {}, BUDGET, "mamal: no such algorithm; there are reptile, fomaml"),
        (["bayes"], {}, BUDGET, "train.algorithm = bayes: for regression"),
        (["reptile"], {}, Budget(gradients=3), "more than 3 gradient evaluations"),
        (["maml"], {"maml": {"train": {"inner_stps": 3}}}, BUDGET, "train.inner_stps: no such"),
        (["ridge"], {"ridge": {"train": {"ways": 99}}}, BUDGET, "99-way task"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    names: list[str],
    changes: dict[str, Any],
    budget: Budget,
    message: str,
    prepared: Path,
    tmp_path: Path,
) -> None:
    settings = Settings.model_validate(SMALL)
    with pytest.raises(InputError, match=message):
        compare(settings, names, 1, budget, prepared, tmp_path, changes=changes)
    assert not list(tmp_path.rglob("checkpoint"))


@pytest.mark.parametrize(
    ("algorithm", "each"),
    [  # of tasks of 3 classes with an image to adapt to and 5 queries each
        ("anil", 32 * (2 * 3 + 15)),
        ("meta-sgd", 32 * (2 * 3 + 15)),
        ("proto-maml", 2 * 6 * 3 + 15 + 3),
        ("pretrain", 64),
    ],
)
def test_an_algorithm_gets_its_settings_and_its_gradients_are_counted(
    algorithm: str, each: int, data: PreparedData
) -> None:
    own = settings_of(algorithm, Settings.model_validate(SMALL), data, {})
    assert own.train.algorithm == algorithm
    assert gradients(own.train) == each


def test_each_step_of_a_multi_step_loss_counts(data: PreparedData) -> None:
    changes = {"train": {"inner_steps": 4, "episode": {"multi_step_loss": True}}}
    own = settings_of("maml", Settings.model_validate(SMALL), data, changes)
    assert gradients(own.train) == 32 * (2 * 4 * 3 + 4 * 15)


def test_a_users_change_is_for_one_algorithm_alone(data: PreparedData) -> None:
    settings = Settings.model_validate(SMALL)
    own = settings_of("maml", settings, data, {"train": {"inner_steps": 4}})
    assert own.train.inner_steps == 4
    assert own.train.optimizer.name == "sgd"
    assert settings_of("reptile", settings, data, {}).train == settings.train


def test_the_command_compares_and_wants_one_budget(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "params.json").write_text(json.dumps(SMALL))
    (tmp_path / "prepared").symlink_to(prepared)
    words = ["compare", "reptile", "ridge", "--params", tmp_path / "params.json"]
    more = ["--artifacts", tmp_path, "-S", "ridge.train.ways=4", "-S", "evaluate.tasks=4"]

    def call(*budget: str) -> int:
        monkeypatch.setattr("sys.argv", ["reptile", *map(str, [*words, *more, *budget])])
        with pytest.raises(SystemExit) as stop:
            cli.run()
        return int(stop.value.code or 0)

    assert call() == 2
    assert call("--seconds", "5", "--gradients", "100") == 2
    assert "--seconds or --gradients, one of them" in capsys.readouterr().err
    assert call("--gradients", "100") == 0
    assert "| ridge |" in capsys.readouterr().out
    assert load_prepared(tmp_path / "prepared").name
    assert (tmp_path / "compare/result.html").is_file()
