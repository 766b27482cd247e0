"""What `reptile check-model` says of a network, and what it refuses."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reptile.errors import InputError
from reptile.learn.check_model import check_model
from reptile.settings import TrainSettings

SHAPE = (1, 16, 16)


def settings(name: str, **more: object) -> TrainSettings:
    return TrainSettings.model_validate(
        {"device": "cpu", "ways": 3, "inner_batch": 4, "model": {"name": name, "filters": 2}} | more
    )


@pytest.mark.parametrize(
    ("adapt", "cut"), [("all", None), ("head", "mean"), ({"last": 1}, "blocks.2")]
)
def test_it_counts_what_is_adapted_and_names_the_cut(adapt: object, cut: str | None) -> None:
    result = check_model(settings("resnet12", adapt=adapt), SHAPE)
    # Convolutions 3x3 and 1x1, four batch norms a block, the head; filters 2, 5, 10, 20.
    blocks, channels = [], 1
    for width in (2, 5, 10, 20):
        blocks.append(9 * (channels * width + 2 * width**2) + channels * width + 8 * width)
        channels = width
    assert result.parameters == sum(blocks) + 63
    assert result.adapted == {"all": result.parameters, "head": 63}.get(str(adapt), blocks[3] + 63)
    assert (result.cut.where if result.cut else None) == cut
    assert result.model.feature_size == 20
    assert result.forward > 0
    assert result.step > 0
    assert f"{result.adapted:,}" in dict(result.rows())["adapted"]


def test_a_step_on_the_head_needs_less_memory_than_one_on_all() -> None:
    head, whole = (
        check_model(settings("resnet12", adapt=adapt), SHAPE).memory for adapt in ("head", "all")
    )
    assert head < whole / 10


@pytest.mark.parametrize("algorithm", ["protonet", "ridge", "fomaml"])
def test_each_algorithm_takes_a_step(algorithm: str) -> None:
    result = check_model(settings("resnet12", algorithm=algorithm), SHAPE)
    assert result.model.outputs == (3 if algorithm == "fomaml" else 0)


def test_the_networks_of_the_library_are_checked_too() -> None:
    result = check_model(settings("conv4"), SHAPE)
    assert result.parameters == result.adapted
    assert result.cut is None


NETS = """
import torch
from torch import nn

class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)) + torch.rand(3)

class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)).detach() + 0 * self.bias

class Integers(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x.flatten(1))

class Infinite(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)) / 0

def noisy(): return Noisy(256, 3)
def detached(): return Detached(256, 3)
def without_gradient(): return Integers(256, 3)
def infinite(): return Infinite(256, 3)
"""


@pytest.fixture
def users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "bad_networks.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("bad_networks", None)


@pytest.mark.usefixtures("users_code")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("noisy", "must not draw at random"),
        ("detached", "a step on random images has no effect"),
        ("without_gradient", "no gradient step on eager on cpu"),
        ("infinite", "outputs that are not finite"),
    ],
)
def test_what_cannot_train_is_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=f"module:bad_networks.{name}: .*{words}"):
        check_model(settings(f"module:bad_networks.{name}"), SHAPE)
