"""Training the networks that settings name: their checkpoints, and resuming."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.learn.checkpoint import load_checkpoint, save_checkpoint
from reptile.learn.run import run_training
from reptile.learn.run_folder import run_folder
from reptile.learn.train import Progress, untrained
from reptile.models import ModuleNetwork, unflatten
from reptile.settings import TrainSettings


def settings(**more: object) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "device": "cpu", "ways": 3, "train_shots": 3, "inner_steps": 2, "inner_batch": 4,
            "meta_batch": 2, "meta_iterations": 4, "checkpoint_every": 2, "validation_tasks": 2,
            "episode": {"shots": [1], "queries": 2},
            "model": {"name": "resnet12", "filters": 2, "input_size": 16},
        } | more
    )  # fmt: skip


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    trained = torchvision.models.shufflenet_v2_x0_5(num_classes=9)
    with torch.no_grad():
        trained(torch.rand(8, 3, 32, 32))  # in training mode: its running statistics move
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    return tmp_path / "trained.safetensors"


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml", "protonet", "ridge"])
@pytest.mark.parametrize("adapt", ["head", {"last": 1}])
def test_a_checkpoint_holds_all_of_a_pretrained_network(
    algorithm: str, adapt: object, weights: Path, data: PreparedData, tmp_path: Path
) -> None:
    pretrained = {"name": "torchvision:shufflenet_v2_x0_5", "weights": str(weights)}
    trained = run_training(settings(algorithm=algorithm, adapt=adapt, model=pretrained), data)
    save_checkpoint(tmp_path / "checkpoint", trained)
    weights.unlink()
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert loaded.info == trained.info
    assert len(loaded.info.weights_sha256) == 64
    images = torch.rand(4, 1, 12, 12)
    outputs = [
        model.forward(unflatten(model, state.weights[: model.initialise(0).numel()]), images)
        for model, state in ((loaded.model, loaded.state), (trained.model, trained.state))
    ]
    assert torch.equal(*outputs)
    assert torch.equal(loaded.model.initialise(0), trained.model.initialise(0))


class StoppedError(Exception):
    pass


def stop_after(iteration: int, progress: Progress) -> None:
    if progress.iteration == iteration:
        raise StoppedError


@pytest.mark.parametrize("adapt", ["head", {"last": 1}, "all"])
def test_an_interrupted_training_resumes_bit_for_bit(
    adapt: object, data: PreparedData, tmp_path: Path
) -> None:
    expected = run_training(settings(adapt=adapt), data)
    with pytest.raises(StoppedError):
        run_training(
            settings(adapt=adapt), data, tmp_path, on_progress=lambda now: stop_after(3, now)
        )
    resumed = run_training(settings(adapt=adapt), data, tmp_path, resume=True)
    assert torch.equal(resumed.state.weights, expected.state.weights)


def test_a_run_belongs_to_the_weights_that_it_starts_from(
    weights: Path, data: PreparedData, tmp_path: Path
) -> None:
    def folder(path: Path) -> Path:
        model = {"name": "torchvision:shufflenet_v2_x0_5", "weights": str(path)}
        return run_folder(tmp_path, untrained(settings(adapt="head", model=model), data).info)

    before = folder(weights)
    assert folder(weights) == before
    other = torchvision.models.shufflenet_v2_x0_5(num_classes=9)
    save_file(other.state_dict(), weights)
    assert folder(weights) != before


def test_a_frozen_network_in_closed_form_learns_only_the_heads_numbers(
    weights: Path, data: PreparedData
) -> None:
    pretrained = {"name": "torchvision:shufflenet_v2_x0_5", "weights": str(weights)}
    trained = run_training(settings(algorithm="ridge", adapt="head", model=pretrained), data)
    assert isinstance(trained.model, ModuleNetwork)
    assert trained.model.shapes == {}
    assert trained.state.weights.shape == (2,)
    learner = trained.closed_form
    images = torch.rand(6, 1, 12, 12)
    module = torchvision.models.shufflenet_v2_x0_5(num_classes=9).eval()
    from safetensors.torch import load_file

    module.load_state_dict(load_file(weights))
    module.fc = torch.nn.Identity()
    torch.testing.assert_close(
        learner.features(images), module(images.expand(-1, 3, -1, -1)).detach()
    )


NETS = """
from torch import nn

def small(outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 6), nn.Tanh(), nn.Linear(6, outputs))
"""


@pytest.fixture
def users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import sys

    (tmp_path / "their_networks.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("their_networks", None)


def test_a_users_function_trains_and_its_checkpoint_loads(
    users_code: Path, data: PreparedData
) -> None:
    import sys

    trained = run_training(settings(model={"name": "module:their_networks.small"}), data)
    save_checkpoint(users_code / "checkpoint", trained)
    loaded = load_checkpoint(users_code / "checkpoint")
    assert torch.equal(loaded.state.weights, trained.state.weights)
    sys.modules.pop("their_networks")
    shutil.rmtree(users_code / "__pycache__", ignore_errors=True)
    (users_code / "their_networks.py").unlink()
    with pytest.raises(InputError, match=r"their_networks.small: their_networks cannot be import"):
        load_checkpoint(users_code / "checkpoint")
