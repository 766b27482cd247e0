"""The meta-step against a literal transcription of the paper's algorithm in float64."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from reptile.data.dataset import ClassRange, PreparedData
from reptile.data.readers.glyphs import draw_glyphs
from reptile.learn.engines import EagerEngine, make_engine
from reptile.learn.optimizer import (
    BETA2,
    EPSILON,
    OptimizerState,
    fresh_state,
    merge_parallel_states,
)
from reptile.learn.reptile import MetaState, meta_step, step_size
from reptile.learn.validate import mean_score
from reptile.models import build_model, initialise, unflatten
from reptile.objectives import CLASSIFICATION
from reptile.settings import ModelSettings, TrainSettings
from reptile.tasks import (
    FewShotProtocol,
    Purpose,
    Task,
    held_out_task,
    random_stream,
    training_tasks,
)

WARM = 1e-2  # a second moment far from zero: a cold first step is the gradient's sign


class Transcription:
    """Nichol et al.'s algorithms with a torch.nn network, torch autograd and plain lists."""

    def __init__(self, flat: torch.Tensor, data: PreparedData, settings: TrainSettings) -> None:
        model = build_model(settings.model, settings.ways, data.image_shape)
        channels, _, _ = data.image_shape
        filters = settings.model.filters
        layers: list[nn.Module] = []
        for layer in range(4):
            inputs = filters if layer else channels
            layers += [
                nn.ZeroPad2d((0, 1, 0, 1)),  # overwritten below for odd sizes
                nn.Conv2d(inputs, filters, 3, stride=2, bias=False),
                nn.BatchNorm2d(filters, eps=1e-3, track_running_stats=False),
                nn.ReLU(),
            ]
        size = data.image_shape[1]
        for layer in range(4):
            if size % 2:
                layers[4 * layer] = nn.ZeroPad2d((1, 1, 1, 1))
            size = -(-size // 2)
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * size**2, settings.ways))
        self.net.double()
        self.params = list(self.net.parameters())
        named = unflatten(model, flat.double())
        with torch.no_grad():
            for param, value in zip(self.params, named.values(), strict=True):
                param.copy_(value)
        self.v = [torch.full_like(p, WARM) for p in self.params]
        self.t = 1000
        self.images = torch.from_numpy(data.images).double() / 255
        self.settings = settings

    def inner_step(self, rows: np.ndarray, labels: np.ndarray) -> None:
        o = self.settings.optimizer
        with torch.no_grad():
            for p in self.params:
                p.mul_(o.weight_decay)
        self.net.zero_grad()
        loss = F.cross_entropy(self.net(self.images[rows]), torch.from_numpy(labels))
        loss.backward()
        self.t += 1
        with torch.no_grad():
            for p, v in zip(self.params, self.v, strict=True):
                g = p.grad
                assert g is not None
                if o.name == "sgd":
                    p.sub_(o.learning_rate * g)
                    continue
                v *= BETA2
                v += (1 - BETA2) * g**2
                p.sub_(o.learning_rate * g / ((v / (1 - BETA2**self.t)).sqrt() + EPSILON))

    def meta_step(self, tasks: list[Task], step_size: float) -> None:
        start = [p.detach().clone() for p in self.params]
        v_start, t_start = [v.clone() for v in self.v], self.t
        pulls: list[list[torch.Tensor]] = []
        v_after: list[list[torch.Tensor]] = []
        for task in tasks:
            if self.settings.optimizer.state == "reset":
                self.v, self.t = [torch.zeros_like(v) for v in self.v], 0
            if self.settings.optimizer.state == "parallel":
                self.v, self.t = [v.clone() for v in v_start], t_start
            backup = start
            for batch in task.batches:
                if self.settings.algorithm == "fomaml":
                    backup = [p.detach().clone() for p in self.params]
                self.inner_step(task.support[batch], task.support_targets[batch])
            pulls.append([p.detach() - b for p, b in zip(self.params, backup, strict=True)])
            v_after.append(self.v)
            with torch.no_grad():
                for p, s in zip(self.params, start, strict=True):
                    p.copy_(s)
        with torch.no_grad():
            for p, *displacements in zip(self.params, *pulls, strict=True):
                p += step_size * sum(displacements) / len(tasks)
        steps = len(tasks[0].batches)
        if self.settings.optimizer.state == "reset":
            self.v, self.t = v_start, t_start
        if self.settings.optimizer.state == "parallel":
            decay = BETA2**steps
            merged = []
            for v0, *vs in zip(v_start, *v_after, strict=True):
                v = v0
                for after in vs:  # as if each task's own squares had come one after another
                    v = decay * v + (after - decay * v0)
                merged.append(v)
            self.v, self.t = merged, t_start + steps * len(tasks)

    def flat(self) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def flat_v(self) -> torch.Tensor:
        return torch.cat([v.reshape(-1) for v in self.v])


def settings_of(**changes: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "model": ModelSettings(filters=6),
        "ways": 3,
        "train_shots": 4,
        "inner_steps": 4,
        "inner_batch": 5,
        "meta_batch": 3,
        "meta_iterations": 10,
    }
    return TrainSettings(**(values | changes))


CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": {"name": "sgd", "learning_rate": 0.05}},
    "sgd with weight decay": {
        "optimizer": {"name": "sgd", "learning_rate": 0.05, "weight_decay": 0.9}
    },
    "sgd fomaml": {"optimizer": {"name": "sgd", "learning_rate": 0.05}, "algorithm": "fomaml"},
    "sgd fomaml tail and decay": {
        "optimizer": {"name": "sgd", "learning_rate": 0.05, "weight_decay": 0.9},
        "algorithm": "fomaml",
        "tail_shots": 1,
    },
    "adam sequential": {"optimizer": {"state": "sequential"}},
    "adam parallel": {"optimizer": {"state": "parallel"}},
    "adam reset": {"optimizer": {"state": "reset"}},
    "adam sequential fomaml tail": {
        "optimizer": {"state": "sequential"},
        "algorithm": "fomaml",
        "tail_shots": 2,
    },
    "replacement": {"replacement": True, "optimizer": {"name": "sgd", "learning_rate": 0.05}},
}


@pytest.mark.parametrize("case", CASES)
def test_meta_step_equals_the_paper_in_float64(case: str, data: PreparedData) -> None:
    settings = settings_of(**CASES[case])
    model = build_model(settings.model, settings.ways, data.image_shape)
    theta = initialise(model, 3)
    paper = Transcription(theta, data, settings)
    engine = EagerEngine(model, settings.optimizer, data.images, torch.device("cpu"))
    theta = theta.double()
    warm = OptimizerState(torch.full_like(theta, WARM), 1000)
    state = MetaState(theta, warm)
    for iteration in range(2):
        tasks = training_tasks(data.split("train"), settings, iteration)
        epsilon = step_size(settings, iteration)
        state, losses = meta_step(engine, state, tasks, settings, epsilon)
        paper.meta_step(tasks, epsilon)
        assert losses.shape == (settings.meta_batch, settings.inner_steps)

    assert not torch.allclose(state.weights, theta, rtol=0, atol=1e-5)
    # `to_unit` scales pixels in float32, hence not 1e-12.
    torch.testing.assert_close(state.weights, paper.flat(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.inner.second_moment, paper.flat_v(), rtol=1e-5, atol=1e-9)
    if settings.optimizer.name == "adam":
        assert state.inner.step == paper.t


def test_adam_update_equals_torch_optim(data: PreparedData) -> None:
    settings = settings_of(meta_batch=1, train_shots=5, inner_steps=6)
    model = build_model(settings.model, settings.ways, data.image_shape)
    theta = initialise(model, 0).double()
    task = training_tasks(data.split("train"), settings, 0)[0]
    engine = EagerEngine(model, settings.optimizer, data.images, torch.device("cpu"))
    adapted = engine.adapt(theta, fresh_state(theta), [task])

    leaf = theta.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=1e-3, betas=(0.0, 0.999), eps=1e-8)
    for batch in task.batches:
        adam.zero_grad()
        images = engine.images(task.support[batch]).double()
        labels = torch.from_numpy(task.support_targets[batch])
        F.cross_entropy(model.forward(unflatten(model, leaf), images), labels).backward()
        adam.step()
    torch.testing.assert_close(adapted.weights[0], leaf.detach())
    torch.testing.assert_close(adapted.state.second_moment[0], adam.state[leaf]["exp_avg_sq"])


def test_parallel_adam_state_equals_sequential_for_given_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    tasks, steps, size = 4, 5, 7
    squares = torch.rand(tasks, steps, size, generator=generator, dtype=torch.float64)
    start = OptimizerState(torch.rand(size, generator=generator, dtype=torch.float64), 321)

    def run(v: torch.Tensor, task: int) -> torch.Tensor:
        for square in squares[task]:
            v = BETA2 * v + (1 - BETA2) * square
        return v

    in_turn = start.second_moment
    for task in range(tasks):
        in_turn = run(in_turn, task)
    side_by_side = torch.stack([run(start.second_moment, task) for task in range(tasks)])
    merged = merge_parallel_states(start, OptimizerState(side_by_side, start.step + steps), tasks)
    torch.testing.assert_close(merged.second_moment, in_turn)
    assert merged.step == start.step + tasks * steps


def test_reset_leaves_the_learnt_state_fresh(data: PreparedData) -> None:
    settings = settings_of(optimizer={"state": "reset"})
    model = build_model(settings.model, settings.ways, data.image_shape)
    theta = initialise(model, 0)
    engine = EagerEngine(model, settings.optimizer, data.images, torch.device("cpu"))
    tasks = training_tasks(data.split("train"), settings, 0)
    state, _ = meta_step(engine, MetaState(theta, fresh_state(theta)), tasks, settings, 1.0)
    assert state.inner.step == 0
    assert not state.inner.second_moment.any()


def test_meta_step_size_is_annealed_linearly() -> None:
    settings = settings_of(meta_step=1.0, meta_step_final=0.5, meta_iterations=10)
    assert [step_size(settings, i) for i in (0, 5, 10)] == [1.0, 0.75, 0.5]


def test_meta_training_beats_its_random_start_on_unseen_alphabets() -> None:
    pixels = draw_glyphs(alphabets=8, characters=10, hands=12).reshape(-1, 1, 28, 28)
    start, count = np.arange(80) * 12, np.full(80, 12)
    seen, unseen = ClassRange(start[:60], count[:60]), ClassRange(start[60:], count[60:])
    settings = settings_of(
        model=ModelSettings(filters=32),
        ways=5,
        train_shots=10,
        inner_steps=5,
        inner_batch=10,
        meta_iterations=150,
    )
    model = build_model(settings.model, settings.ways, (1, 28, 28))
    engine = make_engine("auto", model, settings.optimizer, pixels, torch.device("cpu"))
    protocol = FewShotProtocol(ways=5, shots=1, queries=3, steps=20, batch=5)
    tests = [
        held_out_task(random_stream(0, Purpose.EVALUATE, i), unseen, protocol) for i in range(80)
    ]
    theta = initialise(model, 0)
    before = state = MetaState(theta, fresh_state(theta))
    for iteration in range(settings.meta_iterations):
        tasks = training_tasks(seen, settings, iteration)
        state, _ = meta_step(engine, state, tasks, settings, step_size(settings, iteration))
    after, first = (
        mean_score(engine, each, tests, CLASSIFICATION, "frozen") for each in (state, before)
    )
    gain = after - first
    assert gain > 0.1
