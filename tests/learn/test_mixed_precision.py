"""`train.precision: bf16` against float32, under the CPU's autocast; CUDA's was not run."""

import numpy as np
import pytest
import torch
from patterns import make_data
from torch import Tensor, nn

from reptile.learn.engines import EagerEngine, make_engine
from reptile.learn.engines.batched import BatchedEngine
from reptile.learn.episodic import EpisodicState, episode_losses
from reptile.learn.heads import HEADS
from reptile.learn.optimizer import OptimizerState
from reptile.learn.run import run_training
from reptile.models import ModuleNetwork, build_model, initialise
from reptile.objectives import CLASSIFICATION
from reptile.settings import ModelSettings, OptimizerSettings, TrainSettings
from reptile.tasks import FewShotProtocol, Purpose, episodes, held_out_task, random_stream

CPU = torch.device("cpu")
DATA = make_data()
SGD = OptimizerSettings(name="sgd", learning_rate=0.01)
PROTOCOL = FewShotProtocol(ways=4, shots=2, queries=2, steps=4, batch=4)
TASKS = [
    held_out_task(random_stream(0, Purpose.EVALUATE, number), DATA.split("test"), PROTOCOL)
    for number in range(3)
]


def alike(one: Tensor, other: Tensor, cosine: float = 0.99) -> None:
    """Check that two vectors are close as bfloat16, of 8 bits, allows, and not the same."""
    assert one.dtype == other.dtype == torch.float32
    assert not torch.equal(one, other)
    assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > cosine


@pytest.mark.parametrize("kind", [EagerEngine, BatchedEngine])
@pytest.mark.parametrize(
    ("network", "cosine"),
    # conv4's last batch norms see four values a channel, whose small variance enlarges rounding.
    [(ModelSettings(name="mlp", activation="tanh"), 0.999), (ModelSettings(filters=6), 0.9)],
    ids=["mlp", "conv4"],
)
def test_the_inner_loop_moves_the_weights_as_float32_does(
    network: ModelSettings, cosine: float, kind: type[EagerEngine] | type[BatchedEngine]
) -> None:
    model = build_model(network, 4, DATA.image_shape)
    weights = initialise(model, 0)
    state = OptimizerState(torch.zeros_like(weights), 0)
    exact, mixed = (
        kind(model, SGD, DATA.images, CPU, precision).adapt(weights, state, TASKS)
        for precision in ("float32", "bf16")
    )
    alike(mixed.weights - weights, exact.weights - weights, cosine)
    torch.testing.assert_close(mixed.losses, exact.losses, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("algorithm", HEADS)
def test_an_episode_has_the_gradient_of_float32(algorithm: str) -> None:
    settings = TrainSettings.model_validate(
        {"algorithm": algorithm, "ways": 4, "episode": {"shots": [2], "queries": 2}}
    )
    model, head = build_model(ModelSettings(filters=6), 0, DATA.image_shape), HEADS[algorithm]
    (episode, *_) = episodes(DATA.split("train"), settings, 0)
    gradients: list[Tensor] = []
    for precision in ("float32", "bf16"):
        engine = make_engine(
            "auto" if precision == "bf16" else "eager", model, SGD, DATA.images, CPU, precision
        )
        weights = EpisodicState.start(initialise(model, 0), head).weights.requires_grad_()
        loss = episode_losses(engine, weights, [episode], head).sum()
        gradients += torch.autograd.grad(loss, weights)
    alike(gradients[1], gradients[0])


class Seen(nn.Module):
    """A network that tells the type of its layers' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.types: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        """Map images of 8 by 8 pixels to 4 outputs."""
        hidden = self.hidden(x.flatten(1))
        self.types.append(hidden.dtype)
        outputs: Tensor = self.head(self.norm(hidden))
        return outputs


def test_the_layers_run_in_bfloat16_and_the_statistics_in_float32() -> None:
    model = ModuleNetwork(Seen(), (1, 8, 8), 4, CLASSIFICATION)
    images = np.zeros((3, 1, 8, 8), np.uint8)
    engine = make_engine("eager", model, SGD, images, CPU, "bf16")
    assert isinstance(model.module, Seen)
    model.module.types.clear()
    features = engine.features(initialise(model, 0), np.arange(3))
    assert features.dtype == torch.float32
    engine.statistics(initialise(model, 0), np.arange(3))
    assert model.module.types == [torch.bfloat16, torch.float32]


def test_training_in_bfloat16_goes_where_float32_goes() -> None:
    values = {
        "model": {"filters": 6},
        "ways": 4,
        "optimizer": {"name": "sgd", "learning_rate": 0.01},
        "meta_iterations": 3,
        "meta_batch": 2,
        "checkpoint_every": 3,
        "validation_tasks": 4,
        "device": "cpu",
    }
    trained = [
        run_training(TrainSettings.model_validate(values | {"precision": precision}), DATA)
        for precision in ("float32", "bf16")
    ]
    start = initialise(trained[0].model, 0)
    alike(trained[1].state.weights - start, trained[0].state.weights - start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "native"}, "precision = bf16: engine = native computes in float32"),
        (
            {"algorithm": "maml", "optimizer": {"name": "sgd"}},
            "precision = bf16: algorithm = maml computes in float32",
        ),
        ({"precision": "fp16"}, "precision"),
    ],
)
def test_what_has_no_mixed_precision_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings.model_validate({"precision": "bf16"} | changes)
