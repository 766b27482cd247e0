"""What is measured, against plain torch, scikit-learn and the statistics of simulated scores."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SETTINGS, make_checkpoint, renamed
from sklearn.neighbors import NearestCentroid

from reptile.data.dataset import ClassRange, PreparedData
from reptile.errors import InputError
from reptile.evaluate import Evaluation, Score, adapting, evaluate
from reptile.evaluate.adapting import adapt_along
from reptile.evaluate.confusions import confusions, hardest
from reptile.evaluate.features import apply, raw
from reptile.evaluate.heads import prototypes
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.engines import Adapted, EagerEngine
from reptile.learn.optimizer import OptimizerState
from reptile.learn.predict import query_logits
from reptile.learn.reptile import MetaState
from reptile.models import build_model, flatten, initialise, unflatten
from reptile.objectives import CLASSIFICATION
from reptile.settings import BATCH_NORM_MODES, EvaluateSettings
from reptile.tasks import FewShotProtocol, Task, held_out_task

CPU = torch.device("cpu")


def nearest_mean(images: np.ndarray, task: Task) -> np.ndarray:
    ways = int(task.support_targets.max()) + 1
    (outputs,) = apply(prototypes, raw(images), [task], ways, CLASSIFICATION)
    return np.asarray(outputs.argmax(-1))


@pytest.fixture(scope="module")
def checkpoint(data: PreparedData) -> Checkpoint:
    return make_checkpoint(data)


@pytest.fixture(scope="module")
def evaluation(data: PreparedData, checkpoint: Checkpoint) -> Evaluation:
    return evaluate(SETTINGS, checkpoint, data, {})


@pytest.mark.parametrize("start", ["trained", "random"])
def test_accuracy_and_interval_equal_those_of_plain_torch(data: PreparedData, start: Any) -> None:
    checkpoint = make_checkpoint(data, "mlp")
    measured = evaluate(SETTINGS, checkpoint, data, {}).measurements[1]
    model, (weights, inner), info = checkpoint.model, checkpoint.meta, checkpoint.info
    pixels = torch.from_numpy(data.images).float().flatten(1) / 255
    shares = []
    for task in measured.tasks:
        flat = weights if start == "trained" else initialise(model, info.settings.seed)
        params = [p.clone().requires_grad_() for p in unflatten(model, flat).values()]
        optimiser = torch.optim.Adam(params, lr=1e-3, betas=(0.0, 0.999))
        if start == "trained":
            for p, v in zip(params, unflatten(model, inner.second_moment).values(), strict=True):
                optimiser.state[p] = {
                    "step": torch.tensor(float(inner.step)),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": v.clone(),
                }

        def network(x: torch.Tensor, p: list[torch.Tensor] = params) -> torch.Tensor:
            return torch.relu(x @ p[0].T + p[1]) @ p[2].T + p[3]

        for batch in task.batches:
            optimiser.zero_grad()
            labels = torch.from_numpy(task.support_targets[batch])
            torch.nn.functional.cross_entropy(
                network(pixels[task.support[batch]]), labels
            ).backward()
            optimiser.step()
        right = network(pixels[task.query]).argmax(1).numpy() == task.query_targets
        shares.append(float(right.mean()))
    score = measured.score(start, "transductive")
    assert score.mean == pytest.approx(statistics.mean(shares))
    assert score.interval == pytest.approx(1.96 * statistics.stdev(shares) / len(shares) ** 0.5)


def test_interval_covers_the_true_mean_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    scores = [Score.of(rng.binomial(5, 0.8, size=200) / 5) for _ in range(2000)]
    covered = np.mean([abs(mean - 0.8) <= interval for mean, interval in scores])
    assert 0.935 < covered < 0.965


def test_a_paired_difference_is_the_mean_of_the_differences_task_by_task(
    evaluation: Evaluation,
) -> None:
    measured = evaluation.measurements[0]
    trained, random = (measured.score(start, "frozen").mean for start in ("trained", "random"))
    difference = measured.difference("trained", "random", "frozen")
    assert difference.mean == pytest.approx(trained - random)
    each = measured.scores("trained", "frozen") - measured.scores("random", "frozen")
    expected = 1.96 * statistics.stdev(each.tolist()) / len(each) ** 0.5
    assert difference.interval == pytest.approx(expected)


def test_nearest_mean_agrees_with_scikit_learn() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (160, 1, 6, 6), dtype=np.uint8)
    classes = ClassRange(np.arange(8) * 20, np.full(8, 20))
    flat = pixels.reshape(160, -1) / 255
    for number in range(20):
        protocol = FewShotProtocol(ways=3, shots=5, queries=4, steps=0, batch=1)
        task = held_out_task(np.random.default_rng(number), classes, protocol)
        oracle = NearestCentroid().fit(flat[task.support], task.support_targets)
        np.testing.assert_array_equal(nearest_mean(pixels, task), oracle.predict(flat[task.query]))


def test_frozen_queries_are_independent_and_transductive_ones_are_not(
    data: PreparedData, checkpoint: Checkpoint, evaluation: Evaluation
) -> None:
    measured = evaluation.measurements[1]
    model, state, info = checkpoint.model, checkpoint.meta, checkpoint.info
    engine = EagerEngine(model, info.settings.optimizer, data.images, CPU)
    weights = engine.adapt(*state, measured.tasks).weights
    for number, task in enumerate(measured.tasks):
        params, support = unflatten(model, weights[number]), engine.images(task.support)
        for mode in BATCH_NORM_MODES:
            alone = [
                query_logits(model, params, support, engine.images(task.query[i : i + 1]), mode)
                for i in range(len(task.query))
            ]
            same = np.allclose(measured.logits[mode][number], torch.cat(alone), atol=1e-4)
            assert same == (mode != "transductive")


def test_without_batch_norm_the_modes_coincide(data: PreparedData) -> None:
    evaluation = evaluate(SETTINGS, make_checkpoint(data, "mlp"), data, {})
    measured = evaluation.measurements[0]
    for logits in measured.logits.values():
        np.testing.assert_allclose(logits, measured.logits["frozen"], atol=1e-5)
    assert evaluation.modes == ("frozen",)


def test_both_starts_meet_the_same_tasks(
    data: PreparedData, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Task] = []

    class Recording(EagerEngine):
        def adapt(
            self, weights: torch.Tensor, state: OptimizerState, tasks: Sequence[Task]
        ) -> Adapted:
            met.extend(tasks)
            return super().adapt(weights, state, tasks)

    monkeypatch.setattr(adapting, "make_engine", lambda kind, *rest: Recording(*rest))
    two = SETTINGS.model_copy(update={"shots": (2,)})
    evaluate(two, checkpoint, data, {}, baselines=False)
    half = len(met) // 2
    for trained, random in zip(met[:half], met[half:], strict=True):
        for one, other in zip(trained[:4], random[:4], strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(trained.batches, random.batches)


def test_tasks_do_not_depend_on_what_else_is_measured(
    data: PreparedData, checkpoint: Checkpoint, evaluation: Evaluation
) -> None:
    told: list[tuple[int, int]] = []
    few = evaluate(
        SETTINGS.model_copy(update={"tasks": 3, "shots": (2,)}),
        checkpoint,
        data,
        {"other": renamed(data, "other")},
        lambda done, total: told.append((done, total)),
    )
    assert told[-4:] == [(103, 112), (106, 112), (109, 112), (112, 112)]  # 100 on validation
    assert few.adaptations == 112
    for one, other in zip(few.of(data.name), evaluation.of(data.name)[1:], strict=True):
        for name, logits in one.logits.items():
            np.testing.assert_array_equal(logits, other.logits[name][:3])
        assert set(one.methods) == set(other.methods)
        for method in one.methods:
            few_scores = one.scores(method, "frozen")
            np.testing.assert_array_equal(few_scores, other.scores(method, "frozen")[:3])


def test_nothing_leaks_from_task_to_task(
    data: PreparedData,
    checkpoint: Checkpoint,
    evaluation: Evaluation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = evaluation.measurements[0]
    monkeypatch.setattr(adapting, "TASKS_AT_ONCE", 2)
    monkeypatch.setattr(adapting, "PATH_TASKS", 4)
    one_shot = SETTINGS.model_copy(update={"shots": (1,)})
    in_chunks = evaluate(one_shot, checkpoint, data, {}).measurements[0]
    for name, logits in together.logits.items():
        np.testing.assert_array_equal(logits, in_chunks.logits[name])
    model, state, info = checkpoint.model, checkpoint.meta, checkpoint.info
    engine = EagerEngine(model, info.settings.optimizer, data.images, CPU)
    ((_, forward),) = adapt_along(engine, state, together.tasks, (4,))
    ((_, backward),) = adapt_along(engine, state, together.tasks[::-1], (4,))
    assert torch.equal(forward, backward.flip(0))


def test_adapting_in_segments_equals_adapting_in_one_go(
    data: PreparedData, checkpoint: Checkpoint, evaluation: Evaluation
) -> None:
    tasks = evaluation.measurements[0].tasks
    model, state, info = checkpoint.model, checkpoint.meta, checkpoint.info
    engine = EagerEngine(model, info.settings.optimizer, data.images, CPU)
    along = dict(adapt_along(engine, state, tasks, (0, 1, 3, 4)))
    assert torch.equal(along[0], state.weights.expand(len(tasks), -1))
    assert torch.equal(along[4], engine.adapt(*state, tasks).weights)


def test_the_path_ends_at_the_accuracy_of_its_tasks(evaluation: Evaluation) -> None:
    for measured in evaluation.measurements:
        assert measured.steps == (0, 1, 2, 3, 4)
        for (start, mode), accuracies in measured.by_step.items():
            np.testing.assert_array_equal(accuracies[-1], measured.scores(start, mode))


def test_pure_noise_is_named_by_chance(data: PreparedData, checkpoint: Checkpoint) -> None:
    noise = np.random.default_rng(0).integers(0, 256, data.images.shape, dtype=np.uint8)
    settings = EvaluateSettings(tasks=80, shots=(1,), queries=2, steps=2, batch=3)
    measured = evaluate(settings, checkpoint, PreparedData(noise, data.index), {}).measurements[0]
    scores = [measured.score("trained", mode) for mode in BATCH_NORM_MODES]
    simpler = set(measured.methods) - {"trained", "random"}
    for mean, interval in [*scores, *(measured.score(name, "none") for name in simpler)]:
        assert abs(mean - 1 / 3) < 2 * interval


def test_confusions_count_classes_and_not_labels(
    data: PreparedData, evaluation: Evaluation
) -> None:
    found = confusions(data, evaluation.measurements)
    name_of = {row: c.name for c in data.classes for row in range(c.start, c.start + c.count)}
    names = [c.name for c in found.classes]
    counts = np.zeros_like(found.counts)
    for measured in evaluation.measurements:
        for task, logits in zip(measured.tasks, measured.logits["frozen"], strict=True):
            present = [name_of[task.support[task.support_targets == k][0]] for k in range(3)]
            for row, answer in zip(task.query, logits.argmax(-1), strict=True):
                actual = names.index(name_of[row])
                counts[actual, names.index(present[answer])] += 1
    np.testing.assert_array_equal(found.counts, counts)
    hard = hardest(found, 100)
    assert sum(h.queries - h.right for h in hard) == counts.sum() - np.trace(counts)
    shares = [h.right / h.queries for h in hard]
    assert shares == sorted(shares)
    for entry, _, _, taken_for, times in hard:
        row = np.delete(counts[names.index(entry.name)], names.index(entry.name))
        assert counts[names.index(entry.name), names.index(taken_for.name)] == times == row.max()


def test_ties_go_to_the_first_class() -> None:
    grey = np.full((4, 1, 2, 2), 128, dtype=np.uint8)
    task = Task(np.array([0, 1]), np.array([0, 1]), np.array([2, 3]), np.array([0, 1]), ())
    assert nearest_mean(grey, task).tolist() == [0, 0]


def test_a_cross_domain_set_too_small_for_the_task_is_left_out_and_said_so(
    data: PreparedData,
) -> None:
    index = data.index
    classes = [c for c in index.classes if c.split != "test"]
    classes += [c.model_copy(update={"split": "train"}) for c in index.classes if c.split == "test"]
    none = PreparedData(
        data.images, index.model_copy(update={"name": "small", "classes": tuple(classes)})
    )
    settings = EvaluateSettings(tasks=2, shots=(1,), steps=0)
    evaluation = evaluate(settings, make_checkpoint(data), data, {"small": none})
    assert list(evaluation.data) == [data.name]
    assert "0 classes cannot make a 3-way task" in evaluation.skipped["small"]


def test_held_out_classes_too_few_for_the_task_are_an_error(data: PreparedData) -> None:
    with pytest.raises(InputError, match="8 classes cannot make a 9-way task"):
        evaluate(SETTINGS, make_checkpoint(data, ways=9), data, {})


def test_a_cross_domain_set_of_the_same_name_is_an_error(
    data: PreparedData, checkpoint: Checkpoint
) -> None:
    with pytest.raises(InputError, match="another name"):
        evaluate(SETTINGS, checkpoint, data, {data.name: data})


def with_fewer_outputs(checkpoint: Checkpoint, ways: int) -> Checkpoint:
    """Cut the head down to its first outputs: a network that knows of no others."""
    info = checkpoint.info
    settings = info.settings.model_copy(update={"ways": ways})
    small = build_model(settings.model, ways, info.image_shape)

    def cut(flat: torch.Tensor) -> torch.Tensor:
        params = unflatten(checkpoint.model, flat)
        return flatten(small, params | {k: params[k][:ways] for k in ("head.weight", "head.bias")})

    weights, inner = checkpoint.meta
    state = MetaState(cut(weights), OptimizerState(cut(inner.second_moment), inner.step))
    return Checkpoint(small, state, info.model_copy(update={"settings": settings}))


def test_with_fewer_ways_the_rest_of_the_head_might_as_well_not_be_there(
    data: PreparedData, checkpoint: Checkpoint
) -> None:
    few = evaluate(SETTINGS, checkpoint, data, {}, ways=2).held_out
    small = evaluate(SETTINGS, with_fewer_outputs(checkpoint, 2), data, {}).held_out
    for one, other in zip(few, small, strict=True):
        assert set(one.tasks[0].query_targets) == {0, 1}
        for mode in BATCH_NORM_MODES:
            # An occasional ReLU flips on rounding: the sums of the head have another length.
            np.testing.assert_allclose(one.logits[mode], other.logits[mode], atol=1e-4)


@pytest.mark.parametrize("ways", [1, 4])
def test_ways_that_the_head_has_not_are_refused(
    data: PreparedData, checkpoint: Checkpoint, ways: int
) -> None:
    with pytest.raises(
        InputError, match=f"{ways}-way tasks: reptile trained with 3 ways is for 2 to 3 ways"
    ):
        evaluate(SETTINGS, checkpoint, data, {}, ways=ways)
