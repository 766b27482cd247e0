"""Networks that settings name, with their weights and preprocessing."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from reptile.errors import InputError, PlatformError
from reptile.models import ModuleNetwork, build_model, initialise, size, unflatten
from reptile.models.preprocess import Preprocess
from reptile.settings import ModelSettings

IMAGES = (3, 32, 32)
SMALL = "torchvision:shufflenet_v2_x0_5"


def build(
    name: str, outputs: int = 5, shape: tuple[int, ...] = IMAGES, **more: object
) -> ModuleNetwork:
    load = {key: more.pop(key) for key in ("adapt", "seed", "load") if key in more}
    model = build_model(ModelSettings(name=name, **more), outputs, shape, **load)  # type: ignore[arg-type]
    assert isinstance(model, ModuleNetwork)
    return model


def forward(model: ModuleNetwork, images: Tensor) -> Tensor:
    return model.forward(unflatten(model, initialise(model, 0).to(images.dtype)), images)


def literal_resnet12(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network of the literature with calls of torch.nn.functional only."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(x, None, None, params[f"{name}.weight"], params[f"{name}.bias"], True)

    for block in range(4):
        name = f"blocks.{block}"
        y = x
        for layer in (1, 2, 3):
            y = F.conv2d(y, params[f"{name}.conv{layer}.weight"], padding=1)
            y = norm(y, f"{name}.norm{layer}")
            if layer < 3:
                y = F.leaky_relu(y, 0.1)
        x = norm(F.conv2d(x, params[f"{name}.shortcut.weight"]), f"{name}.shortcut_norm")
        x = F.max_pool2d(F.leaky_relu(y + x, 0.1), 2)
    return F.linear(x.flatten(2).mean(2), params["head.weight"], params["head.bias"])


def test_resnet12_is_the_network_of_the_literature() -> None:
    model = build("resnet12", filters=4)
    weights, images = torch.randn(size(model)).double(), torch.rand(3, *IMAGES).double()
    params = unflatten(model, weights)
    torch.testing.assert_close(model.forward(params, images), literal_resnet12(params, images))
    widths = [params[f"blocks.{block}.conv3.weight"].shape[0] for block in range(4)]
    assert widths == [4, 10, 20, 40]


def test_resnet12_has_the_published_number_of_parameters() -> None:
    assert round(size(build("resnet12", outputs=0)) / 1e6, 1) == 12.4  # as papers report


def test_conv1d_is_three_convolutions_and_a_head() -> None:
    model = build("conv1d", filters=4, shape=(2, 21))
    params = unflatten(model, initialise(model, 0))
    signals = 10 + 3 * torch.randn(6, 2, 21)
    variance, mean = torch.var_mean(signals, (0, 2), keepdim=True, correction=0)
    x = (signals - mean) / (variance + 1e-5).sqrt()
    x = x * params["norm.weight"][:, None] + params["norm.bias"][:, None]
    for block in range(3):
        weight, bias = (params[f"blocks.{block}.0.{name}"] for name in ("weight", "bias"))
        windows = F.pad(x, (2, 2)).unfold(2, 5, 2)  # [B, C, T, 5]
        x = (torch.einsum("bcti,fci->bft", windows, weight) + bias[:, None]).relu()
    assert x.shape == (6, 4, 3)
    expected = x.flatten(1) @ params["head.weight"].T + params["head.bias"]
    torch.testing.assert_close(model.forward(params, signals), expected)


def test_conv1d_wants_signals() -> None:
    with pytest.raises(InputError, match=r"conv1d needs signals \[channels, samples\], not inputs"):
        build("conv1d", filters=4, shape=(1, 8, 8))


@pytest.mark.parametrize("name", ["resnet12", SMALL])
def test_networks_are_drawn_from_the_seed(name: str) -> None:
    first, again, other = (initialise(build(name, filters=2, seed=s), 0) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_drawing_a_network_leaves_the_process_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    build("resnet12", filters=2, seed=9)
    assert torch.equal(torch.rand(2), expected)


def test_torchvisions_network_computes_what_torchvisions_module_computes() -> None:
    torch.manual_seed(0)
    expected = torchvision.models.shufflenet_v2_x0_5(num_classes=5).train()
    model = build(SMALL)
    weights = torch.cat([value.detach().flatten() for value in expected.parameters()])
    images = torch.rand(4, *IMAGES)
    params = unflatten(model, weights)
    torch.testing.assert_close(model.forward(params, images), expected(images))


def test_a_fixed_network_keeps_its_running_statistics(tmp_path: Path) -> None:
    trained = torchvision.models.resnet18(num_classes=7)
    with torch.no_grad():
        trained(torch.rand(8, *IMAGES))  # in training mode: the running statistics move
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    model = build(
        "torchvision:resnet18", weights=str(tmp_path / "trained.safetensors"), adapt="head"
    )
    images = torch.rand(4, *IMAGES)
    trained.eval()
    trained.fc = nn.Identity()
    params = unflatten(model, initialise(model, 0))
    torch.testing.assert_close(model.features(params, images), trained(images))
    assert set(model.shapes) == {"fc.weight", "fc.bias"}
    assert not model.has_batch_norm


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".nested.pth"])
def test_weights_of_a_file_arrive_in_the_network(tmp_path: Path, suffix: str) -> None:
    source = build("resnet12", filters=2, seed=5)
    state = dict(with_running_statistics(source.module.state_dict()))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if "nested" in suffix else state, path)
    model = build("resnet12", filters=2, seed=6, weights=str(path))
    assert torch.equal(initialise(model, 0), initialise(source, 0))
    assert len(model.weights_sha256) == 64
    assert source.weights_sha256 == ""


def with_running_statistics(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A state dict of the plain module: its batch norms have running statistics."""
    for name, value in state.items():
        yield name, value.clone()
        if "norm" in name and name.endswith("weight"):
            stem = name.removesuffix("weight")
            yield f"{stem}running_mean", torch.zeros_like(value)
            yield f"{stem}running_var", torch.ones_like(value)


def saved(path: Path, change: dict[str, Tensor | None]) -> Path:
    model = torchvision.models.squeezenet1_1(num_classes=5)
    state = {**model.state_dict(), **change}
    save_file({name: value for name, value in state.items() if value is not None}, path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"features.0.bias": None},
            "has no features.0.bias, which torchvision:squeezenet1_1 needs",
        ),
        ({"features.0.bias": torch.ones(3)}, "features.0.bias is .3., .* needs .64."),
        ({"extra.weight": torch.ones(1)}, "extra.weight is no parameter of torchvision:squeeze"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_parameter(
    tmp_path: Path, change: dict[str, Tensor | None], words: str
) -> None:
    path = saved(tmp_path / "w.safetensors", change)
    with pytest.raises(InputError, match=words):
        build("torchvision:squeezenet1_1", weights=str(path))


def test_a_head_of_another_size_is_drawn_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path / "w.safetensors", {})
    with caplog.at_level(logging.INFO):
        model = build("torchvision:squeezenet1_1", outputs=3, weights=str(path))
    assert "it is drawn anew" in caplog.text
    assert model.shapes["classifier.1.weight"][0] == 3


class Unsafe:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of a weights file ran",)


def test_weights_that_hold_code_are_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weights": Unsafe()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth: holds more than tensors"):
        build("resnet12", filters=2, weights=str(tmp_path / "w.pth"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.pth", None, "no such file"),
        ("w.safetensors", b"\x10", "cannot be read as weights"),
        ("w.pth", b"PK\x03\x04broken", "cannot be read as weights|holds more"),
        ("w.bin", b"", "must be a .safetensors, .pth or .pt file"),
        ("DEFAULT", None, "must be a .safetensors, .pth or .pt file"),
    ],
)
def test_a_file_that_is_no_weights_is_refused(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        build("resnet12", filters=2, weights=str(tmp_path / name))


def test_torchvisions_weights_come_by_name_with_their_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = torchvision.models.ResNet18_Weights.DEFAULT
    trained = torchvision.models.resnet18()
    checkpoints = tmp_path / "hub/checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(trained.state_dict(), checkpoints / Path(entry.url).name)  # as if downloaded
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = build("torchvision:resnet18", weights="DEFAULT", adapt="head", input_size=48)
    images = torch.rand(2, *IMAGES)
    resized = torchvision.transforms.functional.resize(images, [48, 48], antialias=True)
    seen = torchvision.transforms.functional.normalize(
        resized, entry.transforms().mean, entry.transforms().std
    )
    trained.eval()
    trained.fc = nn.Identity()
    params = unflatten(model, initialise(model, 0))
    torch.testing.assert_close(model.features(params, images), trained(seen))
    by_file = build(
        "torchvision:resnet18",
        weights=str(checkpoints / Path(entry.url).name),
        adapt="head",
        input_size=48,
    )
    torch.testing.assert_close(by_file.features(params, images), trained(seen))
    assert by_file.weights_sha256 == model.weights_sha256


def test_without_a_network_the_way_out_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # refuses every connection
    with pytest.raises(PlatformError, match=r"cannot be downloaded.*give the path"):
        build("torchvision:resnet18", weights="DEFAULT")


def test_unknown_names_are_refused_with_those_that_exist() -> None:
    with pytest.raises(InputError, match=r"torchvision has no resnet19; similar are resnet18,"):
        build("torchvision:resnet19")
    with pytest.raises(InputError, match=r"torchvision has for resnet18 DEFAULT, IMAGENET1K_V1"):
        build("torchvision:resnet18", weights="V7")
    with pytest.raises(InputError, match=r"the network needs 3; set prepare.channels = rgb"):
        build("torchvision:resnet18", shape=(2, 32, 32))
    with pytest.raises(InputError, match=r"do not pass .*; train.model.input_size sets the size"):
        build("resnet12", filters=2, shape=(1, 8, 8))


@pytest.mark.parametrize(("have", "size"), [(28, 64), (28, 17), (64, 28), (5, 5)])
def test_the_resize_is_torchs_own_antialiased_one(have: int, size: int) -> None:
    images = torch.rand(2, 3, have, have + 3, dtype=torch.float64)
    resize = Preprocess((3, have, have + 3), size=size)
    expected = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(resize(images), expected, rtol=1e-6, atol=1e-6)


def test_preprocessing_gives_channels_mean_and_range() -> None:
    grey = torch.rand(2, 1, 8, 8)
    prepared = Preprocess((1, 8, 8), channels=3, mean=(0.1, 0.2, 0.3), deviation=(0.5,))(grey)
    for channel, mean in enumerate((0.1, 0.2, 0.3)):
        torch.testing.assert_close(prepared[:, channel], (grey[:, 0] - mean) / 0.5)
    with pytest.raises(InputError, match="mean has 2 numbers"):
        Preprocess((1, 8, 8), mean=(0.1, 0.2))


def test_preprocessing_exports_to_onnx(tmp_path: Path) -> None:
    import onnxruntime

    preprocess = Preprocess((1, 9, 9), channels=3, size=20, mean=(0.5,), deviation=(0.25,)).eval()
    images = torch.rand(3, 1, 9, 9)
    path = tmp_path / "preprocess.onnx"
    torch.onnx.export(
        preprocess, (images,), path, dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True
    )
    session = onnxruntime.InferenceSession(path)
    more = torch.rand(5, 1, 9, 9)
    (result,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), preprocess(more))


NETS = """
import torch
from torch import nn

def small(outputs, image_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_shape[0] * 64, 6), nn.Tanh(),
                         nn.Linear(6, outputs))

def bare():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

def broken(outputs):
    raise RuntimeError("no such backbone")

def other(outputs):
    return outputs

number = 3
"""


@pytest.fixture
def users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "my_networks.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "my_networks.py"
    sys.modules.pop("my_networks", None)


@pytest.mark.usefixtures("users_code")
def test_a_users_function_is_found_in_the_working_directory() -> None:
    model = build("module:my_networks.small", shape=(1, 8, 8), seed=4)
    assert list(model.shapes) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert torch.equal(
        initialise(model, 0),
        initialise(build("module:my_networks.small", shape=(1, 8, 8), seed=4), 0),
    )
    assert build("module:my_networks.bare", shape=(1, 8, 8)).outputs == 5
    features = build("module:my_networks.small", outputs=0, shape=(1, 8, 8))
    assert features.feature_size == 6
    assert build("module:my_networks.small", shape=(1, 8, 8), input_size=8).feature_size == 6


def test_the_users_code_and_weights_are_hashed(users_code: Path) -> None:
    def sha256(seed: int) -> str:
        return build("module:my_networks.small", shape=(1, 8, 8), seed=seed).weights_sha256

    first = sha256(1)
    assert first == sha256(1)
    assert first != sha256(2)
    users_code.write_text(NETS + "# changed\n")
    assert first != sha256(1)


@pytest.mark.usefixtures("users_code")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_networks.none", "has no function none"),
        ("my_networks.number", "has no function number"),
        ("my_networks.broken", "failed for .*RuntimeError: no such backbone"),
        ("my_networks.other", "returned int, not a torch.nn.Module"),
        ("no_such_package.net", "cannot be imported .ModuleNotFoundError"),
        ("os.getcwd", "is part of Python"),
    ],
)
def test_a_function_that_makes_no_network_is_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=f"train.model.name = module:{name}: .*{words}"):
        build(f"module:{name}", shape=(1, 8, 8))


def test_settings_that_a_network_does_not_have_are_refused() -> None:
    for name, value in (("weights", "w.pth"), ("input_size", 8), ("mean", (0.5,))):
        with pytest.raises(ValueError, match=f"{name} = .*conv4 has none"):
            ModelSettings.model_validate({name: value})
    for name in ("conv5", "torchvision:", "torchvision:a b", "module:net", "module:a..b"):
        with pytest.raises(ValueError, match="must be conv4, mlp, resnet12"):
            ModelSettings(name=name)
