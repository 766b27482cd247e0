"""The compiled kernel against the eager engine in float64, which is the oracle."""

import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reptile.config import ModelSettings, OptimizerSettings
from reptile.episodes import Task
from reptile.errors import InputError
from reptile.learn.batched import BatchedEngine
from reptile.learn.engine import Adapted, EagerEngine, make_engine
from reptile.learn.inner import InnerState, fresh_state
from reptile.learn.native import BuildError, NativeEngine, build
from reptile.models import Model, build_model, initialise, size

SGD = OptimizerSettings(name="sgd", learning_rate=0.05)
ADAM = OptimizerSettings(name="adam", learning_rate=1e-2)
STRIDE = ModelSettings(filters=20)
POOL = ModelSettings(filters=20, downsampling="pool")
MLP = ModelSettings(name="mlp", hidden=20)
ALL = pytest.mark.parametrize("settings", [STRIDE, POOL, MLP], ids=["stride", "pool", "mlp"])
CPU = torch.device("cpu")
IMAGES = 60

# What the float32 eager engine itself reaches against float64 on these is about 1e-6.
GRADIENT_TOLERANCE = 5e-6
TRAJECTORY_TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    """Build once; where there is no compiler the eager engine serves, and there is no test."""
    try:
        build.load_kernel()
    except BuildError as error:
        pytest.skip(str(error))


def images(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (IMAGES, *shape), dtype=np.uint8)


def task(seed: int, ways: int, batches: Sequence[int]) -> Task:
    """A task of 4 images a class with mini-batches of the given sizes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(ways), 4)
    rows = rng.permutation(IMAGES)[: labels.size]
    nothing = np.empty(0, dtype=np.int64)
    positions = tuple(rng.integers(0, labels.size, batch) for batch in batches)
    return Task(rows, labels, nothing, nothing, positions)


def start(model: Model, seed: int = 0) -> Tensor:
    """An initialisation whose batch norms and biases are not trivial either."""
    noise = torch.Generator().manual_seed(seed)
    return initialise(model, seed) + 0.03 * torch.randn(size(model), generator=noise)


def warm(weights: Tensor) -> InnerState:
    """A state in which Adam's step is smooth: a cold one is the sign of the gradient's noise."""
    return InnerState(torch.full_like(weights, 1e-2), 1000)


def oracle(
    model: Model, optimizer: OptimizerSettings, weights: Tensor, state: InnerState, *tasks: Task
) -> Adapted:
    engine = EagerEngine(model, optimizer, images(model.image_shape), CPU)
    precise = InnerState(state.second_moment.double(), state.step)
    return engine.adapt(weights.double(), precise, tasks)


def native(
    model: Model,
    optimizer: OptimizerSettings,
    weights: Tensor,
    state: InnerState,
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
    model: Model, optimizer: OptimizerSettings, weights: Tensor, state: InnerState, *tasks: Task
) -> None:
    expected = oracle(model, optimizer, weights, state, *tasks)
    found = native(model, optimizer, weights, state, *tasks)
    assert distance(found.weights, expected.weights, weights) < TRAJECTORY_TOLERANCE
    torch.testing.assert_close(found.losses.double(), expected.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.state.second_moment.double(), expected.state.second_moment, rtol=1e-4, atol=1e-9
    )
    assert found.state.step == expected.state.step


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
    downsampling: str, filters: int, shape: tuple[int, int, int], batch: int
) -> None:
    settings = ModelSettings.model_validate({"filters": filters, "downsampling": downsampling})
    check_gradient(build_model(settings, 5, shape), batch)


@pytest.mark.parametrize(("hidden", "ways", "batch"), [(64, 5, 10), (20, 3, 1), (70, 15, 33)])
def test_mlp_gradient_is_the_float64_gradient(hidden: int, ways: int, batch: int) -> None:
    check_gradient(build_model(ModelSettings(name="mlp", hidden=hidden), ways, (3, 9, 11)), batch)


def check_gradient(model: Model, batch: int) -> None:
    """With SGD at rate 1 a step is the gradient."""
    optimizer, weights = OptimizerSettings(name="sgd", learning_rate=1), start(model)
    state, work = fresh_state(weights), task(0, model.ways, [batch])
    expected = oracle(model, optimizer, weights, state, work)
    found = native(model, optimizer, weights, state, work)
    assert distance(found.weights, expected.weights, weights) < GRADIENT_TOLERANCE
    assert abs(float(found.losses - expected.losses)) < 1e-5


@ALL
def test_sgd_follows_the_float64_path(settings: ModelSettings) -> None:
    model = build_model(settings, 5, (1, 15, 15))
    weights = start(model)
    assert_same_path(model, SGD, weights, fresh_state(weights), task(0, 5, [10] * 4))


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
    together = native(model, ADAM, starts, InnerState(moments, 50), *tasks)
    for i in range(3):
        alone = native(model, ADAM, starts[i], InnerState(moments[i], 50), tasks[i])
        assert torch.equal(together.weights[i], alone.weights[0])
        assert torch.equal(together.state.second_moment[i], alone.state.second_moment[0])
        assert torch.equal(together.losses[i], alone.losses[0])
    assert_same_path(model, ADAM, starts, InnerState(moments, 50), *tasks)
    shared = native(model, ADAM, starts, InnerState(moments[0], 50), *tasks)
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
    [ModelSettings(), ModelSettings(filters=40, downsampling="pool"), ModelSettings(name="mlp")],
    ids=["stride", "pool", "mlp"],
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


def test_bad_input_is_refused_before_the_kernel_sees_it() -> None:
    model = build_model(MLP, 5, (1, 15, 15))
    engine = NativeEngine(model, SGD, images(model.image_shape), 1)
    weights = start(model)
    state, good = fresh_state(weights), task(0, 5, [10])

    def refused(
        message: str, weights: Tensor = weights, state: InnerState = state, *tasks: Task
    ) -> None:
        with pytest.raises(InputError, match=message):
            engine.adapt(weights, state, tasks)

    refused("no tasks")
    refused("equally many", weights, state, good, task(1, 5, [10, 10]))
    refused("empty", weights, state, good._replace(batches=(np.empty(0, dtype=np.int64),)))
    refused("position .* 20", weights, state, good._replace(batches=(np.array([0, 20]),)))
    refused("position .* -1", weights, state, good._replace(batches=(np.array([-1]),)))
    refused("row .* 60", weights, state, good._replace(support=good.support * 0 + IMAGES))
    refused("label 5", weights, state, good._replace(support_labels=good.support_labels + 1))
    refused("weights", weights[:-1], state, good)
    refused("float32", weights.double(), state, good)
    refused("second_moment", weights, InnerState(weights[:-1], 0), good)
    with pytest.raises(InputError, match="uint8"):
        NativeEngine(model, SGD, images((3, 15, 15)))


def test_images_are_the_eager_engines() -> None:
    model, pixels = build_model(MLP, 5, (1, 15, 15)), images((1, 15, 15))
    rows = np.array([3, 0, 3])
    expected = EagerEngine(model, SGD, pixels, CPU).images(rows)
    assert torch.equal(NativeEngine(model, SGD, pixels).images(rows), expected)


# ---- Choosing and building


def test_auto_takes_the_native_engine_and_eager_stays_eager() -> None:
    model, pixels = build_model(MLP, 5, (1, 15, 15)), images((1, 15, 15))
    assert make_engine("auto", model, SGD, pixels, CPU).name.startswith("native")
    assert make_engine("native", model, SGD, pixels, CPU).name.startswith("native")
    assert make_engine("eager", model, SGD, pixels, CPU).name == "eager on cpu"
    cuda = torch.device("cuda")
    assert isinstance(make_engine("auto", model, SGD, pixels, cuda), BatchedEngine)
    with pytest.raises(InputError, match="not on cuda"):
        make_engine("native", model, SGD, pixels, cuda)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it, and a small source that builds fast."""
    source = tmp_path / "source" / "kernel.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reptile"


def libraries(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("kernel-*.so")}


def test_kernel_is_built_once_and_again_for_other_sources_or_flags(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.load_kernel().one() == 1
    first = libraries(empty_cache)
    build.load_kernel()
    assert libraries(empty_cache) == first
    build.SOURCE.with_name("part.h").write_text("// another file of the same kernel\n")
    build.load_kernel()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    build.load_kernel()
    assert len(libraries(empty_cache)) == 3
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700
    assert not list(empty_cache.glob(".kernel-*"))


def test_built_library_serves_where_there_is_no_compiler(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler"):
        build.load_kernel()
    monkeypatch.delenv("CXX")
    build.load_kernel()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.load_kernel().one() == 1


def test_library_shipped_beside_its_source_needs_neither_compiler_nor_cache(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPTILE_MARCH", "x86-64-v2")
    build.load_kernel()
    (library,) = empty_cache.glob("kernel-*.so")
    library.rename(build.SOURCE.with_name(library.name))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-such-place")  # nobody can write here
    assert build.load_kernel().one() == 1
    build.SOURCE.write_text(f"{build.SOURCE.read_text()}// changed since\n")
    with pytest.raises(BuildError):
        build.load_kernel()


def test_cache_that_others_can_write_to_is_refused(empty_cache: Path) -> None:
    empty_cache.mkdir(parents=True)
    empty_cache.chmod(0o777)
    with pytest.raises(BuildError, match="other users can write"):
        build.load_kernel()


def test_failing_compiler_falls_back_to_eager_with_one_line(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.SOURCE.write_text("int broken( {\n")
    with pytest.raises(BuildError) as raised:
        build.load_kernel()
    assert "error" in str(raised.value) and "\n" not in str(raised.value)
    assert not libraries(empty_cache)

    monkeypatch.setattr("reptile.learn.native._kernel", build.load_kernel)
    model, pixels = build_model(MLP, 5, (1, 15, 15)), images((1, 15, 15))
    fallback = make_engine("auto", model, SGD, pixels, CPU)
    assert isinstance(fallback, EagerEngine)
    assert str(raised.value) in fallback.name
    with pytest.raises(InputError, match=r"train\.engine = native: .*error"):
        make_engine("native", model, SGD, pixels, CPU)


def test_two_processes_build_one_library_between_them(empty_cache: Path) -> None:
    compiler = empty_cache.parent.parent / "slow-compiler"
    log = compiler.with_suffix(".log")
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\necho >> {log}\nsleep 1\n'
        'exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    script = (  # the module by itself: importing its package would import torch
        "from pathlib import Path; import runpy; "
        f"build = runpy.run_path({build.__file__!r}); load = build['load_kernel']; "
        f"load.__globals__['SOURCE'] = Path({str(build.SOURCE)!r}); assert load().one() == 1"
    )
    environment = {**os.environ, "CXX": str(compiler)}
    runs = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
    assert len(log.read_text()) == 1  # lines: one compilation
    assert len(libraries(empty_cache)) == 1
