"""Which methods are compared for a checkpoint, on what, and how one is chosen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import SETTINGS, make_checkpoint, renamed
from patterns import make_data
from scipy import stats

from reptile.data.dataset import Inputs, PreparedData
from reptile.errors import InputError
from reptile.evaluate import Evaluation, comparison, evaluate
from reptile.evaluate.comparison import Comparison
from reptile.evaluate.features import Embedding, embed
from reptile.evaluate.metrics import read_metrics
from reptile.evaluate.write import metrics, write_evaluation
from reptile.learn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from reptile.learn.episodic import ClosedForm
from reptile.learn.run import run_training
from reptile.learn.unadapted import HeadName, as_closed_form, unadapted
from reptile.minibatches import IntArray
from reptile.models import initialise
from reptile.settings import EvaluateSettings, TrainSettings
from reptile.tasks import Task

FAST = SETTINGS.model_copy(update={"tasks": 4, "shots": (2,)})


def train_episodic(data: PreparedData, algorithm: str) -> Checkpoint:
    values = {
        "algorithm": algorithm,
        "model": {"filters": 4},
        "ways": 4,
        "engine": "eager",
        "device": "cpu",
        "meta_iterations": 12,
        "meta_batch": 2,
        "checkpoint_every": 12,
        "validation_tasks": 2,
        "episode": {"shots": [1, 2], "queries": 2},
    }
    return run_training(TrainSettings.model_validate(values), data)


@pytest.fixture(scope="module")
def closed(data: PreparedData) -> Checkpoint:
    return train_episodic(data, "ridge")


@pytest.fixture(scope="module")
def checkpoint(data: PreparedData) -> Checkpoint:
    return make_checkpoint(data)


@pytest.fixture(scope="module")
def together(data: PreparedData, checkpoint: Checkpoint, closed: Checkpoint) -> Evaluation:
    return evaluate(SETTINGS, checkpoint, data, {}, beside={"second": closed})


def by_hand(checkpoint: Checkpoint, data: PreparedData, task: Task) -> np.ndarray:
    """One task with the network's own forward pass and nothing of the rows' code."""
    learner = unadapted(checkpoint, data, "prototypes")
    pixels = torch.from_numpy(data.images).float() / 255
    support, query = (
        learner.model.features(learner.params, pixels[rows], learner.statistics).double().numpy()
        for rows in (task.support, task.query)
    )
    ways = int(task.support_targets.max()) + 1
    means = np.stack([support[task.support_targets == label].mean(0) for label in range(ways)])
    distances = np.stack([[np.sum((q - c) ** 2) for c in means] for q in query])
    return np.asarray(distances.argmin(-1) == task.query_targets)


def test_prototypes_are_those_of_the_features_each_image_alone(
    data: PreparedData, checkpoint: Checkpoint, together: Evaluation
) -> None:
    for measured in together.measurements:
        shares = [by_hand(checkpoint, data, task).mean() for task in measured.tasks]
        np.testing.assert_allclose(measured.scores("prototypes", "frozen"), shares)


def test_untrained_features_are_those_of_the_weights_before_training(
    data: PreparedData, checkpoint: Checkpoint, together: Evaluation
) -> None:
    weights = initialise(checkpoint.model, checkpoint.info.settings.seed)
    start = checkpoint._replace(state=checkpoint.meta._replace(weights=weights))
    measured = together.measurements[1]
    shares = [by_hand(start, data, task).mean() for task in measured.tasks]
    np.testing.assert_allclose(measured.scores("random_prototypes", "none"), shares)


def test_a_closed_form_learner_answers_in_an_evaluation_as_it_does_alone(
    data: PreparedData, closed: Checkpoint
) -> None:
    evaluation = evaluate(SETTINGS, closed, data, {})
    assert evaluation.ways == 5  # not the four of training
    assert evaluation.adaptations == 0
    learner = closed.closed_form
    pixels = torch.from_numpy(data.images).float() / 255
    for measured in evaluation.measurements:
        assert "prototypes" in measured.methods
        assert "ridge" not in measured.methods  # it is the trained learner
        assert measured.modes("trained") == ("none",)
        for task, logits in zip(measured.tasks, measured.outputs("frozen"), strict=True):
            support, query = (learner.features(pixels[rows]) for rows in (task.support, task.query))
            labels = torch.from_numpy(task.support_targets)
            expected = learner.classifier(support, labels, 5).logits(query)
            np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("head", ["prototypes", "ridge"])
def test_a_learner_without_adaptation_is_a_closed_form_checkpoint(
    data: PreparedData, checkpoint: Checkpoint, head: HeadName, tmp_path: Path
) -> None:
    rows = Comparison(SETTINGS, 3, checkpoint, data, {}, baselines=True)
    drawn = rows.draw(data.split("test"), 2)
    made = as_closed_form(checkpoint, data, head, rows.strength(head, 2))
    alone = Comparison(SETTINGS, 3, made, data, {}, baselines=False)
    expected = rows.outputs(head, rows.embeddings(data, drawn.tasks, (head,)), drawn)
    found = alone.outputs("trained", alone.embeddings(data, drawn.tasks, ("trained",)), drawn)
    scale = 4 if head == "ridge" else 1  # R2D2's, where training starts
    np.testing.assert_allclose(found, scale * expected, rtol=1e-5, atol=1e-6)
    assert made.model.outputs == 0
    save_checkpoint(tmp_path, made)
    assert load_checkpoint(tmp_path).info.settings.closed_form


def test_a_checkpoint_beside_has_the_scores_that_it_has_alone(
    data: PreparedData, closed: Checkpoint, together: Evaluation
) -> None:
    alone = evaluate(SETTINGS, closed, data, {}, ways=3)
    for one, other in zip(together.measurements, alone.measurements, strict=True):
        np.testing.assert_array_equal(
            one.scores("second", "frozen"), other.scores("trained", "none")
        )
    assert metrics(together).beside == ("second",)
    assert together.choice is not None
    assert set(together.choice.scores) == {"trained", "second", "prototypes", "ridge"}


def test_two_learners_of_gradient_steps_can_be_measured_together(
    data: PreparedData, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    weights = initialise(checkpoint.model, 5)
    other = checkpoint._replace(state=checkpoint.meta._replace(weights=weights))
    found = evaluate(FAST, checkpoint, data, {}, beside={"other": other})
    (measured,), (alone,) = found.measurements, evaluate(FAST, other, data, {}).measurements
    for mode in ("transductive", "frozen"):
        np.testing.assert_array_equal(measured.scores("other", mode), alone.scores("trained", mode))
    write_evaluation(found, tmp_path)
    against = read_metrics(tmp_path).differences["patterns"][2]["other"]["transductive"]
    each = alone.scores("trained", "transductive") - measured.scores("trained", "transductive")
    assert against.mean == pytest.approx(each.mean(), abs=1e-5)


@pytest.mark.parametrize("name", ["ridge", "trained", "a b", ""])
def test_a_name_beside_that_is_taken_or_no_name_is_refused(
    data: PreparedData, checkpoint: Checkpoint, closed: Checkpoint, name: str
) -> None:
    with pytest.raises(InputError, match="use another name"):
        evaluate(FAST, checkpoint, data, {}, beside={name: closed})


def test_a_checkpoint_of_other_data_beside_is_refused(
    data: PreparedData, checkpoint: Checkpoint
) -> None:
    info = checkpoint.info.model_copy(update={"splits_sha256": "f" * 64})
    with pytest.raises(InputError, match="--beside second: it was trained on patterns"):
        evaluate(FAST, checkpoint, data, {}, beside={"second": checkpoint._replace(info=info)})


def test_the_strength_of_ridge_is_the_best_on_validation_tasks(
    data: PreparedData, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Comparison(FAST, 3, checkpoint, data, {}, baselines=True)
    drawn = chosen._validation(2, 0, comparison.STRENGTH_TASKS)
    assert drawn is not None
    validation = {
        row
        for entry in data.classes
        if entry.split == "validation"
        for row in range(entry.start, entry.start + entry.count)
    }
    assert all(set(task.support) | set(task.query) <= validation for task in drawn.tasks)
    means = {}
    for factor in comparison.STRENGTHS:
        monkeypatch.setattr(comparison, "STRENGTHS", (factor,))
        one = Comparison(FAST, 3, checkpoint, data, {}, baselines=True)
        embeddings = one.embeddings(data, drawn.tasks, ("ridge",))
        strength = one.strength("ridge", 2)
        assert strength is not None
        means[strength] = one.scores(one.outputs("ridge", embeddings, drawn), drawn).mean()
    assert means[chosen.strength("ridge", 2) or 0] == max(means.values())
    assert len(means) == 6


def test_the_choice_is_the_simplest_within_one_standard_error_of_the_best(
    together: Evaluation, data: PreparedData, checkpoint: Checkpoint, closed: Checkpoint
) -> None:
    """By each class's share of right answers, counted query by query."""
    choice = together.choice
    assert choice is not None and choice.tasks == 200 and choice.best == choice.order[0]
    assert list(choice.scores) == ["second", "prototypes", "ridge", "trained"]  # numbers trained
    compared = Comparison(SETTINGS, 3, checkpoint, data, {"second": closed}, baselines=True)
    entries = [entry for entry in data.classes if entry.split == "validation"]
    right: dict[str, list[list[bool]]] = {name: [[] for _ in entries] for name in choice.scores}
    for shots in SETTINGS.shots:
        drawn = compared._validation(shots, comparison.STRENGTH_TASKS, comparison.CHOICE_TASKS)
        assert drawn is not None
        embeddings = compared.embeddings(data, drawn.tasks, ("second", "prototypes", "ridge"))
        for name, counts in right.items():
            if name == "trained":
                outputs = compared.adapt(name, data, drawn, modes=("frozen",)).outputs["frozen"]
            else:
                outputs = compared.outputs(name, embeddings, drawn)
            for task, logits in zip(drawn.tasks, outputs, strict=True):
                for row, label, each in zip(task.query, task.query_targets, logits, strict=True):
                    (place,) = [
                        number
                        for number, entry in enumerate(entries)
                        if entry.start <= row < entry.start + entry.count
                    ]
                    counts[place].append(bool(each.argmax() == label))
    shares = {
        name: np.array([np.mean(each) for each in counts if each]) for name, counts in right.items()
    }
    best = max(shares, key=lambda name: shares[name].mean())
    classes = len(shares[best])
    assert choice.classes == classes
    for name, each in shares.items():
        assert choice.scores[name].mean == pytest.approx(each.mean(), abs=1e-5)
        short = shares[best] - each
        wide = stats.t.ppf(stats.norm.cdf(1), classes - 1) * short.std(ddof=1) / np.sqrt(classes)
        if name == choice.best:
            assert short.mean() <= wide
            break
        assert short.mean() > wide


def test_auto_takes_what_is_chosen_of_this_checkpoint_and_never_one_beside(
    data: PreparedData, checkpoint: Checkpoint, closed: Checkpoint
) -> None:
    auto = FAST.model_copy(update={"learner": "auto"})
    found = evaluate(auto, checkpoint, data, {}, beside={"second": closed})
    assert found.choice is not None and found.choice.best == "second"
    assert found.learner == found.choice.order[1]
    written = metrics(found)
    assert written.learner == found.learner
    assert written.best_of(["trained", "second"]) == "second"
    assert found.learner not in written.differences["patterns"][2]


def test_a_learner_without_adaptation_is_what_others_are_compared_with(
    data: PreparedData, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    found = evaluate(FAST.model_copy(update={"learner": "ridge"}), checkpoint, data, {})
    (measured,) = found.measurements
    against = metrics(found).differences["patterns"][2]
    for mode in ("transductive", "non_transductive", "frozen"):
        each = measured.scores("trained", mode) - measured.scores("ridge", "none")
        assert against["trained"][mode].mean == pytest.approx(each.mean(), abs=1e-5)
    assert set(against["nearest_mean"]) == {"none"}
    write_evaluation(found, tmp_path)


def test_a_learner_that_there_is_not_is_refused(data: PreparedData, closed: Checkpoint) -> None:
    settings = FAST.model_copy(update={"learner": "ridge"})
    with pytest.raises(InputError, match="no such row for a checkpoint of ridge; use trained"):
        evaluate(settings, closed, data, {})


def test_without_a_validation_split_nothing_is_chosen(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_data(classes={"train": 12, "test": 8})
    found = evaluate(FAST.model_copy(update={"learner": "auto"}), make_checkpoint(data), data, {})
    assert found.choice is None
    assert found.learner == "trained"
    assert "took trained" in caplog.text
    assert metrics(found).strengths["ridge"][2] > 0


def test_validation_tasks_have_as_many_classes_as_there_are(closed: Checkpoint) -> None:
    data = make_data(classes={"train": 12, "validation": 3, "test": 8})
    found = evaluate(FAST, train_episodic(data, "protonet"), data, {})
    assert found.choice is not None
    assert (found.ways, found.choice.ways) == (5, 3)
    assert "prototypes" not in found.measurements[0].methods  # it is the trained learner


def test_the_ways_of_a_task_are_the_settings(
    data: PreparedData, checkpoint: Checkpoint, closed: Checkpoint
) -> None:
    two = EvaluateSettings.model_validate({**FAST.model_dump(), "ways": 2})
    assert metrics(evaluate(two, checkpoint, data, {})).ways == 2
    eight = two.model_copy(update={"ways": 8})
    assert metrics(evaluate(eight, closed, data, {})).ways == 8  # more than in training
    with pytest.raises(InputError, match=r"8-way tasks: .* is for 2 to 3 ways"):
        evaluate(eight, checkpoint, data, {})
    with pytest.raises(InputError, match="8 classes cannot make a 9-way task"):
        evaluate(two.model_copy(update={"ways": 9}), closed, data, {})


def test_each_input_passes_through_a_network_once(
    data: PreparedData, closed: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counting(learner: ClosedForm, images: Inputs, rows: IntArray) -> Embedding:
        seen.append(len(np.unique(rows)))
        return embed(learner, images, rows)

    monkeypatch.setattr(comparison, "embed", counting)
    other = renamed(data, "other")
    evaluate(SETTINGS.model_copy(update={"tasks": 60}), closed, data, {"other": other})
    test_images = 8 * 20
    assert sum(count == test_images for count in seen) == 2 * 2  # networks x datasets
    assert max(seen) <= max(test_images, 12 * 20)
