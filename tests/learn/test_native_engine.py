"""The compiled kernel against the eager engine in float64, which is the oracle."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from reptile.errors import InputError
from reptile.learn.engines import Adapted, EagerEngine
from reptile.learn.engines.base import adapt_each
from reptile.learn.engines.native import NativeEngine
from reptile.learn.optimizer import OptimizerState, fresh_state
from reptile.learn.reptile import MetaState, meta_step
from reptile.models import Model, build_model, initialise, size
from reptile.objectives import CLASSIFICATION, REGRESSION, Objective
from reptile.settings import ModelSettings, OptimizerSettings, TrainSettings
from reptile.tasks import Task

SGD = OptimizerSettings(name="sgd", learning_rate=0.05)
ADAM = OptimizerSettings(name="adam", learning_rate=1e-2)
STRIDE = ModelSettings(filters=20)
POOL = ModelSettings(filters=20, downsampling="pool")
MLP = ModelSettings(name="mlp", hidden=(20,))
DEEP = ModelSettings(name="mlp", hidden=(20, 7, 33), activation="tanh")
NAMED = {"stride": STRIDE, "pool": POOL, "mlp": MLP, "deep": DEEP}
ALL = pytest.mark.parametrize("settings", NAMED.values(), ids=NAMED)
OBJECTIVES = pytest.mark.parametrize("objective", [CLASSIFICATION, REGRESSION])
CPU = torch.device("cpu")
IMAGES = 60

# What the float32 eager engine itself reaches against float64 on these is about 1e-6.
GRADIENT_TOLERANCE = 5e-6
TRAJECTORY_TOLERANCE = 1e-5


pytestmark = pytest.mark.usefixtures("kernel")


def images(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (IMAGES, *shape), dtype=np.uint8)


def task(seed: int, ways: int, batches: Sequence[int]) -> Task:
    """A task of 4 images a class with mini-batches of the given sizes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(ways), 4)
    rows = rng.permutation(IMAGES)[: labels.size]
    nothing = np.empty(0, dtype=np.int64)
    positions = tuple(rng.integers(0, labels.size, batch) for batch in batches)
    return Task(rows, labels, nothing, nothing, positions)


def with_values(task: Task, outputs: int) -> Task:
    """The same task for a regressor."""
    values = np.random.default_rng(7).normal(size=(len(task.support), outputs))
    return task._replace(support_targets=values.astype(np.float32))


def start(model: Model, seed: int = 0) -> Tensor:
    """An initialisation whose batch norms and biases are not trivial either."""
    noise = torch.Generator().manual_seed(seed)
    return initialise(model, seed) + 0.03 * torch.randn(size(model), generator=noise)


def warm(weights: Tensor) -> OptimizerState:
    """A state in which Adam's step is smooth: a cold one is the sign of the gradient's noise."""
    return OptimizerState(torch.full_like(weights, 1e-2), 1000)


def oracle(
    model: Model, optimizer: OptimizerSettings, weights: Tensor, state: OptimizerState, *tasks: Task
) -> Adapted:
    engine = EagerEngine(model, optimizer, images(model.image_shape), CPU)
    precise = OptimizerState(state.second_moment.double(), state.step)
    return engine.adapt(weights.double(), precise, tasks)


def native(
    model: Model,
    optimizer: OptimizerSettings,
    weights: Tensor,
    state: OptimizerState,
    *tasks: Task,
    threads: int = 2,
) -> Adapted:
    engine = NativeEngine(model, optimizer, images(model.image_shape), threads)
    return engine.adapt(weights, state, tasks)


def distance(found: Tensor, expected: Tensor, origin: Tensor) -> float:
    """Relative to the way moved from the origin."""
    moved = expected - origin.double()
    return float((found.double() - expected).norm() / moved.norm())


def assert_same_path(
    model: Model, optimizer: OptimizerSettings, weights: Tensor, state: OptimizerState, *tasks: Task
) -> None:
    expected = oracle(model, optimizer, weights, state, *tasks)
    found = native(model, optimizer, weights, state, *tasks)
    assert distance(found.weights, expected.weights, weights) < TRAJECTORY_TOLERANCE
    torch.testing.assert_close(found.losses.double(), expected.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.state.second_moment.double(), expected.state.second_moment, rtol=1e-4, atol=1e-9
    )
    assert found.state.step == expected.state.step


@OBJECTIVES
@pytest.mark.parametrize("downsampling", ["stride", "pool"])
@pytest.mark.parametrize(
    ("filters", "shape", "batch"),
    [
        (64, (1, 28, 28), 10),
        (64, (3, 20, 20), 5),
        (40, (1, 15, 15), 7),
        (20, (3, 15, 20), 13),
        (20, (1, 28, 28), 1),
        (8, (3, 10, 13), 10),
        (8, (1, 2, 3), 6),
        (1, (1, 10, 10), 2),
    ],
)
def test_gradient_is_the_float64_gradient(
    objective: Objective,
    downsampling: str,
    filters: int,
    shape: tuple[int, int, int],
    batch: int,
) -> None:
    settings = ModelSettings.model_validate({"filters": filters, "downsampling": downsampling})
    check_gradient(build_model(settings, 5, shape, objective), batch)


@OBJECTIVES
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(
    ("hidden", "shape", "outputs", "batch"),
    [
        ((64,), (3, 9, 11), 5, 10),
        ((20,), (3, 9, 11), 3, 1),
        ((70,), (3, 9, 11), 15, 33),
        ((64, 64), (1, 1, 1), 2, 10),
        ((5, 40), (2, 1, 1), 4, 7),
        ((33, 16, 3), (1, 4, 5), 5, 12),
        ((9, 50, 1, 17), (1, 4, 5), 3, 5),
    ],
)
def test_mlp_gradient_is_the_float64_gradient(
    objective: Objective,
    activation: str,
    hidden: tuple[int, ...],
    shape: tuple[int, int, int],
    outputs: int,
    batch: int,
) -> None:
    settings = ModelSettings.model_validate(
        {"name": "mlp", "hidden": hidden, "activation": activation}
    )
    check_gradient(build_model(settings, outputs, shape, objective), batch)


def check_gradient(model: Model, batch: int) -> None:
    """With SGD at rate 1 a step is the gradient."""
    optimizer, weights = OptimizerSettings(name="sgd", learning_rate=1), start(model)
    state, work = fresh_state(weights), task(0, model.outputs, [batch])
    if model.objective is REGRESSION:
        work = with_values(work, model.outputs)
    expected = oracle(model, optimizer, weights, state, work)
    found = native(model, optimizer, weights, state, work)
    assert distance(found.weights, expected.weights, weights) < GRADIENT_TOLERANCE
    assert abs(float(found.losses - expected.losses)) < 1e-5


@ALL
def test_sgd_follows_the_float64_path(settings: ModelSettings) -> None:
    model = build_model(settings, 5, (1, 15, 15))
    weights = start(model)
    assert_same_path(model, SGD, weights, fresh_state(weights), task(0, 5, [10] * 4))


@OBJECTIVES
@ALL
def test_two_meta_iterations_of_sgd_end_where_float64_does(
    settings: ModelSettings, objective: Objective
) -> None:
    model = build_model(settings, 5, (1, 15, 15), objective)
    pixels, weights = images(model.image_shape), start(model)
    training = TrainSettings(optimizer=SGD, inner_steps=4)
    ends = []
    for engine, theta in (
        (NativeEngine(model, SGD, pixels, 2), weights),
        (EagerEngine(model, SGD, pixels, CPU), weights.double()),
    ):
        state = MetaState(theta, fresh_state(theta))
        for iteration in range(2):
            tasks = [task(3 * iteration + number, 5, [10] * 4) for number in range(3)]
            if objective is REGRESSION:
                tasks = [with_values(own, 5) for own in tasks]
            state = meta_step(engine, state, tasks, training, step_size=0.5).state
        ends.append(state.weights)
    assert distance(ends[0], ends[1], weights) < TRAJECTORY_TOLERANCE


def test_targets_of_a_single_output_need_no_second_dimension() -> None:
    model = build_model(DEEP, 1, (1, 4, 4), REGRESSION)
    weights, work = start(model), with_values(task(0, 5, [10]), 1)
    flat = work._replace(support_targets=work.support_targets[:, 0])
    expected = oracle(model, SGD, weights, fresh_state(weights), flat)
    assert_same_path(model, SGD, weights, fresh_state(weights), flat)
    assert torch.equal(
        expected.weights, oracle(model, SGD, weights, fresh_state(weights), work).weights
    )


@ALL
def test_values_are_taken_as_they_are_and_pixels_scaled(settings: ModelSettings) -> None:
    model = build_model(settings, 5, (1, 15, 15))
    pixels, weights = images(model.image_shape), start(model)
    values = (pixels / np.float32(255)).astype(np.float32)
    arguments = weights, fresh_state(weights), [task(0, 5, [10] * 2)]
    scaled, taken = (NativeEngine(model, SGD, own).adapt(*arguments) for own in (pixels, values))
    assert torch.equal(scaled.weights, taken.weights)
    eager = EagerEngine(model, SGD, values, CPU).adapt(*arguments)
    assert distance(taken.weights, eager.weights.double(), weights) < TRAJECTORY_TOLERANCE


@ALL
def test_warm_adam_follows_the_float64_path(settings: ModelSettings) -> None:
    model = build_model(settings, 5, (1, 15, 15))
    weights = start(model)
    tasks = [task(seed, 5, [10] * 4) for seed in range(3)]
    assert_same_path(model, ADAM, weights, warm(weights), *tasks)


def test_cold_adam_takes_its_first_step_by_the_sign_of_the_gradient() -> None:
    model = build_model(MLP, 5, (1, 15, 15))
    weights = start(model)
    found = native(model, ADAM, weights, fresh_state(weights), task(0, 5, [10]))
    moved = (found.weights[0] - weights).abs()
    torch.testing.assert_close(moved[moved > 1e-6].mean(), torch.tensor(1e-2), rtol=1e-2, atol=0)
    assert found.state.step == 1


@ALL
def test_weight_decay_comes_before_the_gradient(settings: ModelSettings) -> None:
    model = build_model(settings, 5, (1, 15, 15))
    weights = start(model)
    for optimizer in (SGD, ADAM):
        decaying = optimizer.model_copy(update={"weight_decay": 0.9})
        assert_same_path(model, decaying, weights, warm(weights), task(0, 5, [10] * 3))


@ALL
def test_mini_batches_may_differ_in_size(settings: ModelSettings) -> None:
    model = build_model(settings, 5, (1, 15, 15))
    weights = start(model)
    tasks = [task(0, 5, [3, 17, 1, 8]), task(1, 5, [9, 12, 20, 5])]
    assert_same_path(model, SGD, weights, fresh_state(weights), *tasks)


@ALL
def test_each_task_may_have_its_own_start(settings: ModelSettings) -> None:
    model = build_model(settings, 5, (1, 15, 15))
    starts = torch.stack([start(model, seed) for seed in range(3)])
    moments = torch.stack([torch.full_like(starts[0], 1e-2 * (i + 1)) for i in range(3)])
    tasks = [task(seed, 5, [10, 6]) for seed in range(3)]
    together = native(model, ADAM, starts, OptimizerState(moments, 50), *tasks)
    for i in range(3):
        alone = native(model, ADAM, starts[i], OptimizerState(moments[i], 50), tasks[i])
        assert torch.equal(together.weights[i], alone.weights[0])
        assert torch.equal(together.state.second_moment[i], alone.state.second_moment[0])
        assert torch.equal(together.losses[i], alone.losses[0])
    assert_same_path(model, ADAM, starts, OptimizerState(moments, 50), *tasks)
    shared = native(model, ADAM, starts, OptimizerState(moments[0], 50), *tasks)
    assert torch.equal(shared.weights[0], together.weights[0])


@ALL
def test_no_steps_leave_everything_as_it_was(settings: ModelSettings) -> None:
    model = build_model(settings, 5, (1, 15, 15))
    weights = start(model)
    for optimizer in (SGD, ADAM):
        found = native(model, optimizer, weights, warm(weights), task(0, 5, []), task(1, 5, []))
        assert torch.equal(found.weights, weights.expand(2, -1))
        assert torch.equal(found.state.second_moment, warm(weights).second_moment.expand(2, -1))
        assert found.state.step == 1000
        assert found.losses.shape == (2, 0)


def test_sgd_counts_its_steps_and_leaves_the_second_moment_alone() -> None:
    model = build_model(STRIDE, 5, (1, 15, 15))
    weights = start(model)
    found = native(model, SGD, weights, warm(weights), task(0, 5, [10]))
    assert torch.equal(found.state.second_moment[0], warm(weights).second_moment)
    assert found.state.step == 1001


@ALL
def test_equal_images_give_finite_weights(settings: ModelSettings) -> None:
    """Batch norm then divides by the root of its epsilon alone."""
    model = build_model(settings, 2, (1, 15, 15))
    engine = NativeEngine(model, ADAM, np.full((IMAGES, 1, 15, 15), 255, dtype=np.uint8), 1)
    weights = start(model)
    found = engine.adapt(weights, warm(weights), [task(0, 2, [8] * 3)])
    assert found.weights.isfinite().all() and found.losses.isfinite().all()


@ALL
def test_divergence_shows_and_does_not_outlive_its_call(settings: ModelSettings) -> None:
    """A NaN reaches the loss, as in eager mode, and leaves nothing in the engine's memory."""
    model = build_model(settings, 5, (1, 15, 15))
    engine = NativeEngine(model, SGD, images(model.image_shape), 1)
    weights = start(model)
    spoilt, work = weights.clone(), task(0, 5, [10] * 2)
    spoilt[3] = float("nan")
    before = engine.adapt(weights, fresh_state(weights), [work])
    assert engine.adapt(spoilt, fresh_state(weights), [work]).losses.isnan().all()
    after = engine.adapt(weights, fresh_state(weights), [work])
    assert torch.equal(before.weights, after.weights)


@pytest.mark.parametrize(
    "settings",
    [
        ModelSettings(),
        ModelSettings(filters=40, downsampling="pool"),
        ModelSettings(name="mlp"),
        ModelSettings(name="mlp", hidden=(100, 40, 70)),
    ],
    ids=["stride", "pool", "mlp", "deep"],
)
def test_the_number_of_threads_changes_no_bit(settings: ModelSettings) -> None:
    model = build_model(settings, 5, (1, 28, 28))
    weights = start(model)
    for tasks in ([task(0, 5, [40, 25])], [task(seed, 5, [40, 9]) for seed in range(3)]):
        one, *more = (
            native(model, ADAM, weights, warm(weights), *tasks, threads=threads)
            for threads in (1, 2, 3)
        )
        for other in more:
            assert torch.equal(one.weights, other.weights)
            assert torch.equal(one.state.second_moment, other.state.second_moment)
            assert torch.equal(one.losses, other.losses)


@ALL
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_tasks_in_turn_are_calls_one_after_another(
    settings: ModelSettings, optimizer: OptimizerSettings
) -> None:
    model = build_model(settings, 5, (1, 16, 16))
    tasks = [task(seed, 5, [10, 3, 10]) for seed in range(3)]
    weights = start(model)
    for threads in (1, 2, 3):
        engine = NativeEngine(model, optimizer, images(model.image_shape), threads)
        found = engine.adapt_sequential(weights, warm(weights), tasks)
        expected = adapt_each(engine.adapt, weights, warm(weights), tasks)
        assert torch.equal(found.weights, expected.weights)
        assert torch.equal(found.losses, expected.losses)
        assert torch.equal(found.state.second_moment, expected.state.second_moment)
        assert found.state.step == expected.state.step == 1009


def test_bad_input_is_refused_before_the_kernel_sees_it() -> None:
    model = build_model(MLP, 5, (1, 15, 15))
    engine = NativeEngine(model, SGD, images(model.image_shape), 1)
    weights = start(model)
    state, good = fresh_state(weights), task(0, 5, [10])

    def refused(
        message: str, weights: Tensor = weights, state: OptimizerState = state, *tasks: Task
    ) -> None:
        with pytest.raises(InputError, match=message):
            engine.adapt(weights, state, tasks)

    refused("no tasks")
    refused("equally many", weights, state, good, task(1, 5, [10, 10]))
    refused("empty", weights, state, good._replace(batches=(np.empty(0, dtype=np.int64),)))
    refused("position .* 20", weights, state, good._replace(batches=(np.array([0, 20]),)))
    refused("position .* -1", weights, state, good._replace(batches=(np.array([-1]),)))
    refused("row .* 60", weights, state, good._replace(support=good.support * 0 + IMAGES))
    refused("label 5", weights, state, good._replace(support_targets=good.support_targets + 1))
    refused("weights", weights[:-1], state, good)
    refused("float32", weights.double(), state, good)
    refused("second_moment", weights, OptimizerState(weights[:-1], 0), good)
    refused("integers", weights, state, with_values(good, 5))
    refused("integers", weights, state, good._replace(support_targets=good.support_targets[1:]))
    for wrong in (images((3, 15, 15)), images((1, 15, 15)).astype(np.float64)):
        with pytest.raises(InputError, match="takes uint8 or float32"):
            NativeEngine(model, SGD, wrong)  # type: ignore[arg-type]

    regressor = build_model(MLP, 5, (1, 15, 15), REGRESSION)
    engine = NativeEngine(regressor, SGD, images(model.image_shape), 1)
    refused("floating point", weights, state, good)
    refused("floating point", weights, state, with_values(good, 1))
    single = with_values(good, 5)
    refused(
        "floating point",
        weights,
        state,
        single._replace(support_targets=single.support_targets[:, 0]),
    )


def test_images_are_the_eager_engines() -> None:
    model, pixels = build_model(MLP, 5, (1, 15, 15)), images((1, 15, 15))
    rows = np.array([3, 0, 3])
    expected = EagerEngine(model, SGD, pixels, CPU).images(rows)
    assert torch.equal(NativeEngine(model, SGD, pixels).images(rows), expected)
