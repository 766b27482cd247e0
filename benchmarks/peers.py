"""MAML and ProtoNet beside plain PyTorch, and beside learn2learn where its sources are at hand.

learn2learn 0.2.0 does not install with Python 3.11, but its algorithms are plain Python. Unpack its
source archive, and name the folder that has `learn2learn/` in the environment variable LEARN2LEARN;
without it, those lines are left out.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import CPU, class_range
from benchmarks.results import Row, compared
from benchmarks.timing import Effort, Measure, interleave, stopwatch
from reptile.errors import InputError
from reptile.learn.engines import Engine, make_engine
from reptile.learn.episodic import EpisodicState, episodic_step
from reptile.learn.heads import HEADS
from reptile.learn.maml import maml_step
from reptile.models import BATCH_NORM_EPSILON, CONV_LAYERS, build_model, initialise, unflatten
from reptile.settings import TrainSettings
from reptile.tasks import Task, episodes

SHAPE = (1, 28, 28)
FILTERS = 64
RATE, OUTER_RATE = 0.01, 1e-3
AUTO = "reptile-fewshot, auto"
PEER_SPEED = 2.0  # of the native engine against plain PyTorch, at least


def maml(effort: Effort) -> Row:
    """Time one meta-step of MAML: 5-way 1-shot, 5 inner steps on all images, 5 queries a class."""
    settings = TrainSettings.model_validate(
        {
            "algorithm": "maml",
            "train_shots": 1,
            "inner_steps": 5,
            "inner_batch": 5,
            "meta_batch": 1 if effort.quick else 4,
            "optimizer": {"name": "sgd", "learning_rate": RATE, "state": "reset"},
            "episode": {"queries": 5},
        }
    )
    engine, drawn = _work("eager", settings, settings.ways)
    weights = initialise(engine.model, 0)
    state = EpisodicState(weights, torch.zeros_like(weights), torch.zeros_like(weights), 0)
    ours = partial(maml_step, engine, state, drawn, settings, OUTER_RATE)
    network = plain_network(engine, weights, settings.ways)
    lines: dict[str, Callable[[], Sequence[Tensor]]] = {
        "plain PyTorch": partial(plain_maml, network, engine, drawn),
        "reptile-fewshot, eager": lambda: [*ours()[1]],
    }
    if package := learn2learn("algorithms.maml"):
        lines["learn2learn"] = partial(_learn2learn_maml, package, network, engine, drawn)
    return _row(
        "maml", "MAML, conv4, 5-way 1-shot, 5 inner steps: a meta-step", lines, drawn, effort
    )


def protonet(effort: Effort) -> Row:
    """Time one step of ProtoNet's training: an episode of 20 classes, 1 shot, 5 queries."""
    settings = TrainSettings.model_validate(
        {"algorithm": "protonet", "ways": 20, "meta_batch": 1, "episode": {"shots": [1]}}
    )
    lines: dict[str, Callable[[], Sequence[Tensor]]] = {}
    head = HEADS["protonet"]
    engine, drawn = _work("eager", settings, 0)
    weights = initialise(engine.model, 0)
    network = plain_network(engine, weights, 0)
    lines["plain PyTorch"] = partial(plain_protonet, network, engine, drawn)
    if package := learn2learn("nn.protonet"):
        lines["learn2learn"] = partial(_learn2learn_protonet, package, network, engine, drawn)
    state = EpisodicState.start(weights, head)

    def ours(engine: Engine) -> Sequence[Tensor]:
        return [*episodic_step(engine, state, drawn, head, OUTER_RATE)[1]]

    for name in ("eager", "auto"):
        lines[f"reptile-fewshot, {name}"] = partial(ours, _work(name, settings, 0)[0])
    return _row("protonet", "ProtoNet, conv4: a 20-way 1-shot episode", lines, drawn, effort)


def _work(name: str, settings: TrainSettings, ways: int) -> tuple[Engine, list[Task]]:
    pixels = np.random.default_rng(0).integers(0, 256, (800, *SHAPE), dtype=np.uint8)
    model = build_model(settings.model, ways, SHAPE)
    engine = make_engine(name, model, settings.optimizer, pixels, CPU)
    return engine, episodes(class_range(40, 20), settings, 0)


def _row(
    name: str,
    title: str,
    lines: dict[str, Callable[[], Sequence[Tensor]]],
    drawn: list[Task],
    effort: Effort,
) -> Row:
    """Time the lines, after a look that all compute the same losses."""
    losses = [torch.stack(list(run())).detach() for run in lines.values()]
    for each in losses:
        torch.testing.assert_close(each, losses[0], rtol=1e-3, atol=1e-4)
    measures: dict[str, Measure] = {label: stopwatch(run) for label, run in lines.items()}
    times = interleave(measures, effort)
    return Row(
        name=name,
        title=title,
        lines=compared(
            times,
            next(iter(lines)),
            limits={AUTO: PEER_SPEED} if AUTO in lines else None,
            tasks=len(drawn),
        ),
    )


def plain_network(engine: Engine, weights: Tensor, ways: int) -> nn.Sequential:
    """Return conv4 as one writes it in PyTorch, with the weights [P]; without a head for 0 ways."""
    layers: list[nn.Module] = []
    channels, side = SHAPE[0], SHAPE[1]
    for _ in range(CONV_LAYERS):
        layers += [
            nn.ZeroPad2d((side % 2, 1, side % 2, 1)),  # TensorFlow's "same", as in the paper
            nn.Conv2d(channels, FILTERS, 3, stride=2, bias=False),
            nn.BatchNorm2d(FILTERS, eps=BATCH_NORM_EPSILON, track_running_stats=False),
            nn.ReLU(),
        ]
        channels, side = FILTERS, (side + 1) // 2
    layers.append(nn.Flatten())
    if ways:
        layers.append(nn.Linear(engine.model.feature_size, ways))
    network = nn.Sequential(*layers)
    with torch.no_grad():
        values = unflatten(engine.model, weights).values()
        for parameter, value in zip(network.parameters(), values, strict=True):
            parameter.copy_(value)
    return network


def _pairs(engine: Engine, task: Task) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = torch.from_numpy(task.support_targets), torch.from_numpy(task.query_targets)
    return engine.images(task.support), labels[0], engine.images(task.query), labels[1]


def _outer(network: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), OUTER_RATE)


def _no_step(optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    """Take the step and take it back, so that each timing starts from the same weights."""
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), before, strict=True):
            parameter.copy_(value)


def plain_maml(network: nn.Module, engine: Engine, drawn: list[Task]) -> list[Tensor]:
    """Take a meta-step as its paper's box reads."""
    optimizer, losses = _outer(network), []
    for task in drawn:
        images, labels, queries, answers = _pairs(engine, task)
        weights: dict[str, Tensor] = dict(network.named_parameters())
        for positions in task.batches:
            batch = torch.from_numpy(positions)
            outputs = torch.func.functional_call(network, weights, (images[batch],))
            loss = F.cross_entropy(outputs, labels[batch])
            gradients = torch.autograd.grad(loss, [*weights.values()], create_graph=True)
            weights = {
                name: value - RATE * gradient
                for (name, value), gradient in zip(weights.items(), gradients, strict=True)
            }
        outputs = torch.func.functional_call(network, weights, (queries,))
        loss = F.cross_entropy(outputs, answers)
        torch.autograd.backward(loss / len(drawn))
        losses.append(loss.detach())
    _no_step(optimizer, network)
    return losses


def _learn2learn_maml(
    package: Any, network: nn.Module, engine: Engine, drawn: list[Task]
) -> list[Tensor]:
    learner, losses = package.MAML(network, lr=RATE), []
    optimizer = _outer(network)
    for task in drawn:
        images, labels, queries, answers = _pairs(engine, task)
        clone = learner.clone()
        for positions in task.batches:
            batch = torch.from_numpy(positions)
            clone.adapt(F.cross_entropy(clone(images[batch]), labels[batch]))
        loss = F.cross_entropy(clone(queries), answers)
        torch.autograd.backward(loss / len(drawn))
        losses.append(loss.detach())
    _no_step(optimizer, network)
    return losses


def plain_protonet(network: nn.Module, engine: Engine, drawn: list[Task]) -> list[Tensor]:
    """Take a step on the loss of the nearest prototype."""

    def logits(support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        prototypes = torch.stack(
            [support[labels == k].mean(0) for k in range(int(labels.max()) + 1)]
        )
        return -torch.cdist(queries, prototypes).square()

    return _prototypes_step(logits, network, engine, drawn)


def _learn2learn_protonet(
    package: Any, network: nn.Module, engine: Engine, drawn: list[Task]
) -> list[Tensor]:
    def logits(support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        found: Tensor = package.PrototypicalClassifier(support, labels)(queries)
        return found

    return _prototypes_step(logits, network, engine, drawn)


def _prototypes_step(
    logits: Callable[[Tensor, Tensor, Tensor], Tensor],
    network: nn.Module,
    engine: Engine,
    drawn: list[Task],
) -> list[Tensor]:
    optimizer, losses = _outer(network), []
    for task in drawn:
        images, labels, queries, answers = _pairs(engine, task)
        features = network(torch.cat([images, queries]))
        support, asked = features.split([len(images), len(queries)])
        loss = F.cross_entropy(logits(support, labels, asked), answers)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
    _no_step(optimizer, network)
    return losses


def learn2learn(module: str) -> ModuleType | None:
    """Return a module of learn2learn from the folder LEARN2LEARN, without what it imports besides.

    Raises:
        InputError: the folder has no learn2learn.
    """
    if not (named := os.environ.get("LEARN2LEARN")):
        return None
    folder = Path(named) / "learn2learn"
    if not folder.is_dir():
        raise InputError(f"LEARN2LEARN = {named}: it has no folder learn2learn")
    for name, path in _packages(folder):  # empty: their own __init__ imports all of it
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules.setdefault(name, package)
    return importlib.import_module(f"learn2learn.{module}")


def _packages(folder: Path) -> Iterator[tuple[str, Path]]:
    yield "learn2learn", folder
    for below in ("algorithms", "nn"):
        yield f"learn2learn.{below}", folder / below
