"""Bundles of MAML's variants: their graphs in ONNX Runtime against PyTorch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from bundles import WAYS

from reptile import from_arrays
from reptile.data.dataset import PreparedData
from reptile.export import reference
from reptile.export.graphs import build_graphs
from reptile.export.reference import SupportSet
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.run import run_training
from reptile.models import unflatten
from reptile.settings import TrainSettings

RATE = 0.05


@pytest.fixture(scope="module")
def data() -> PreparedData:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60 * 8, 1, 8, 8), dtype=np.uint8)
    return from_arrays(pixels, np.repeat(np.arange(60), 8))


def trained(data: PreparedData, **changes: object) -> Checkpoint:
    values: dict[str, object] = {
        "model": {"filters": 4},
        "ways": WAYS,
        "train_shots": 2,
        "inner_steps": 2,
        "inner_batch": 4,
        "optimizer": {"name": "sgd", "learning_rate": RATE},
        "meta_batch": 2,
        "meta_iterations": 3,
        "checkpoint_every": 3,
        "validation_tasks": 1,
        "device": "cpu",
    }
    return run_training(TrainSettings.model_validate(values | changes), data)


RESNET = {"name": "resnet12", "filters": 2, "input_size": 16}
LAYERS = {"queries": 2, "layer_step_sizes": True}
FAST = "proto-maml, sizes of layers"
CASES: dict[str, Callable[[PreparedData], Checkpoint]] = {
    "meta-sgd": lambda data: trained(data, algorithm="meta-sgd"),
    "proto-maml": lambda data: trained(data, algorithm="proto-maml"),
    "proto-maml, sizes of layers": lambda data: trained(
        data, algorithm="proto-maml", episode=LAYERS
    ),
    "proto-maml, fixed part": lambda data: trained(
        data, algorithm="proto-maml", model=RESNET, adapt={"last": 1}, episode=LAYERS
    ),
}


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != FAST]


@pytest.mark.parametrize("case", [FAST, *SLOW])
def test_adapt_and_few_shot_equal_pytorch(
    case: str, data: PreparedData, make_task: Callable[..., SupportSet]
) -> None:
    checkpoint = CASES[case](data)
    vary_sizes(checkpoint)
    sessions = {
        name: ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        for name, graph in build_graphs(checkpoint, 8).items()
    }
    queries = make_task((1, 8, 8), 4, 0, seed=9).images

    def run(graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        names = [output.name for output in sessions[graph].get_outputs()]
        return dict(zip(names, sessions[graph].run(names, feeds), strict=True))

    for count, steps in ((1, 2), (6, 0), (9, 5)):  # fewer classes, no step, more than in training
        task = make_task((1, 8, 8), count, steps, min(4, count), seed=count)
        found = run("adapt", task.feeds(checkpoint))
        wanted = reference.adapt(checkpoint, task, torch.float64)
        assert found.pop("finite")
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=5e-5, atol=5e-5)
        asked = {"query_images": queries.astype(np.float32)}
        logits = run("few_shot", task.feeds(checkpoint) | asked)["logits"]
        expected = reference.predict_adapted(checkpoint, wanted, queries, torch.float64)
        np.testing.assert_allclose(logits, expected, rtol=5e-5, atol=1e-4)


def vary_sizes(checkpoint: Checkpoint) -> None:
    """Make the learnt step sizes differ widely, in place."""
    sizes = checkpoint.state.weights[checkpoint.meta.weights.numel() :]
    sizes.mul_(torch.linspace(0.2, 2, max(len(sizes), 1))[: len(sizes)])


def test_the_reference_starts_from_the_prototypes_and_takes_each_steps_sizes(
    data: PreparedData, make_task: Callable[..., SupportSet]
) -> None:
    """Against a literal loop, which shares no code with either."""
    checkpoint = CASES["proto-maml, sizes of layers"](data)
    vary_sizes(checkpoint)
    model = checkpoint.model
    task = make_task((1, 8, 8), 8, 3)
    found = reference.adapt(checkpoint, task, torch.float64)
    images = checkpoint.info.network_input(torch.from_numpy(task.images)).double()
    labels = torch.from_numpy(task.labels)
    sizes = checkpoint.state.weights[checkpoint.meta.weights.numel() :].double()
    sizes = sizes.view(len(model.shapes), 2)
    params = dict(unflatten(model, checkpoint.meta.weights.double()))
    features = model.features(params, images)
    centres = torch.stack([features[labels == label].mean(0) for label in range(WAYS)])
    params |= {"head.weight": 2 * centres, "head.bias": -(centres * centres).sum(1)}
    losses = []
    for step, batch in enumerate(map(torch.from_numpy, task.batches)):
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        loss = F.cross_entropy(model.forward(leaves, images[batch]), labels[batch])
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        losses.append(float(loss.detach()))
        params = {
            name: value - RATE * sizes[layer, min(step, 1)] * gradient
            for layer, ((name, value), gradient) in enumerate(
                zip(leaves.items(), gradients, strict=True)
            )
        }
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-10)
    np.testing.assert_allclose(
        found["head.weight"], params["head.weight"].detach().numpy(), rtol=1e-9
    )
