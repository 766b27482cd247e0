"""From settings to a network."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reptile.errors import InputError
from reptile.models.base import Model, Network, unflatten
from reptile.models.conv1d import Conv1d
from reptile.models.conv4 import Conv4
from reptile.models.forward_order import run_once
from reptile.models.mlp import MLP
from reptile.models.module import ModuleNetwork
from reptile.models.preprocess import GREY, RGB, Preprocess
from reptile.models.pretrained import PretrainedNetwork
from reptile.models.resnet12 import ResNet12
from reptile.models.towers import Towers
from reptile.models.weights import (
    download,
    network_weights,
    put_weights,
    read_weights,
    tensors_sha256,
    weights_entry,
)
from reptile.objectives import CLASSIFICATION, Objective
from reptile.settings import Adapt, ModelSettings, TowerSettings

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum


def build_model(
    settings: ModelSettings,
    outputs: int,
    image_shape: tuple[int, ...],
    objective: Objective = CLASSIFICATION,
    *,
    adapt: Adapt = "all",
    seed: int = 0,
    load: bool = True,
) -> Model:
    """Build the network that `settings` names.

    Args:
        settings: its name, weights and sizes.
        outputs: a classifier's ways, or the number of values that a regressor predicts; 0 for a
            network without a head.
        image_shape: (C, H, W) of an input; a point of n coordinates is (n, 1, 1).
        objective: what the outputs are for.
        adapt: which parameters are adapted and meta-trained.
        seed: of what a torch module draws when it is made.
        load: whether to read the weights that the settings name; not where a checkpoint has them.

    Raises:
        InputError: the network does not fit the images, or the weights not the network.
        PlatformError: the weights cannot be downloaded.
    """
    if settings.towers:
        towers = tuple(
            _build_tower(tower, image_shape, objective, seed, load) for tower in settings.towers
        )
        return Towers(towers, image_shape, objective)
    if settings.is_module:
        return _build_module(settings, outputs, image_shape, objective, adapt, seed, load)
    if settings.name == "mlp":
        return MLP(outputs, image_shape, settings, objective)
    if len(image_shape) != 3 or min(image_shape[1:]) < 2:
        raise InputError(f"conv4 needs images of at least 2x2 pixels, not inputs of {image_shape}")
    return Conv4(outputs, image_shape, settings, objective)


def _build_tower(
    settings: TowerSettings,
    image_shape: tuple[int, ...],
    objective: Objective,
    seed: int,
    load: bool,
) -> Model:
    """Build a tower; one of this library's functions of weights may have a preprocessing too."""
    if settings.is_module:
        return _build_module(settings, 0, image_shape, objective, settings.adapt, seed, load)
    preprocess = _preprocess(settings, None, image_shape)
    if preprocess:
        image_shape = tuple(preprocess(torch.zeros(1, *image_shape)).shape[1:])
    model = build_model(settings, 0, image_shape, objective)
    assert isinstance(model, Network)
    model = replace(model, preprocess=preprocess)
    frozen = settings.adapt == "none"
    if not (settings.weights or frozen):
        return model
    weights, sha256 = unflatten(model, model.initialise(seed)), ""
    if settings.weights and load:
        stored = read_weights(Path(settings.weights))
        weights = network_weights(stored, model.shapes, model.name, settings.weights)
        sha256 = tensors_sha256(weights)
    return PretrainedNetwork(model, weights, frozen=frozen, weights_sha256=sha256)


def _build_module(
    settings: ModelSettings,
    outputs: int,
    image_shape: tuple[int, ...],
    objective: Objective,
    adapt: Adapt,
    seed: int,
    load: bool,
) -> ModuleNetwork:
    source, _, name = settings.name.partition(":")
    entry = _torchvision_entry(settings)
    preprocess = _preprocess(settings, entry, image_shape)
    inputs = torch.zeros(2, *image_shape)
    if preprocess:
        inputs = preprocess(inputs)
    seen = tuple(inputs.shape[1:])
    identity: list[bytes] = []  # of the user's code, which no other hash covers
    with _drawn_from(seed):
        if source == "torchvision":
            module = _torchvision(name, max(outputs, 1), trained=entry is not None)
        elif source == "module":
            module, code = _users(name, {"outputs": max(outputs, 1), "image_shape": seen})
            identity += [code, tensors_sha256(module.state_dict()).encode()]
        elif source == "conv1d":
            if len(seen) != 2:
                raise InputError(f"conv1d needs signals [channels, samples], not inputs of {seen}")
            module = Conv1d(settings.filters, *seen, max(outputs, 1))
        else:
            module = ResNet12(settings.filters, seen[0], max(outputs, 1))
    module = module.cpu().float().eval()
    try:
        forward = run_once(module, inputs, settings.name)
    except InputError as error:
        raise InputError(f"{error}; train.model.input_size sets the size of its input") from error
    last = forward.last.name if forward.last else ""
    if settings.weights and load:
        path = Path(settings.weights)
        by_name = entry is not None and not path.suffix
        weights = download(entry, settings.weights) if by_name else read_weights(path)
        if entry:  # GoogLeNet's and Inception's heads for training alone
            weights = {k: v for k, v in weights.items() if not k.lower().startswith("aux")}
        put_weights(module, weights, last, settings.name, settings.weights)
        identity.append(tensors_sha256(module.state_dict()).encode())
    sha256 = hashlib.sha256(b"\0".join(identity)).hexdigest() if identity else ""
    if outputs == 0 and forward.outputs.shape[1:] == (1,):  # without the head of one output
        module.set_submodule(last, nn.Identity())
    return ModuleNetwork(
        module,
        image_shape,
        outputs,
        objective,
        adapt=adapt,
        preprocess=preprocess,
        name=settings.name,
        weights_sha256=sha256,
    )


def _preprocess(
    settings: ModelSettings, entry: "WeightsEnum | None", image_shape: tuple[int, ...]
) -> Preprocess | None:
    """Return what the settings, or else torchvision's weights, ask for; None for nothing."""
    size, mean, deviation = settings.input_size, settings.mean, settings.deviation
    channels = {"grey": GREY, "rgb": RGB, "auto": 0}[settings.channels]
    if settings.channels == "auto" and settings.name.startswith("torchvision:"):
        channels = RGB
    if entry:
        trained = entry.transforms()
        size = size or trained.crop_size[0]
        mean, deviation = mean or tuple(trained.mean), deviation or tuple(trained.std)
    if not (size or mean or deviation or channels not in {0, image_shape[0]}):
        return None
    return Preprocess(image_shape, channels=channels, size=size, mean=mean, deviation=deviation)


def _torchvision_entry(settings: ModelSettings) -> "WeightsEnum | None":
    """Return torchvision's entry of the weights, by their name or by that of their file."""
    source, _, name = settings.name.partition(":")
    if source != "torchvision" or not settings.weights:
        return None
    _builder(name)
    path = Path(settings.weights)
    if not path.suffix:
        return weights_entry(name, settings.weights)
    from torchvision.models import get_model_weights

    return next((each for each in get_model_weights(name) if each.url.endswith(path.name)), None)


def _torchvision(name: str, outputs: int, *, trained: bool) -> nn.Module:
    options: dict[str, Any] = {}
    if name in {"googlenet", "inception_v3"}:
        options = {"aux_logits": False, "init_weights": False, "transform_input": trained}
    module: nn.Module = _builder(name)(weights=None, num_classes=outputs, **options)
    return module


def _builder(name: str) -> Callable[..., nn.Module]:
    try:
        import torchvision.models as models
    except ImportError:
        raise InputError(
            f"train.model.name = torchvision:{name}: torchvision is not installed"
        ) from None
    known = models.list_models(module=models)
    if name not in known:
        raise InputError(
            f"train.model.name = torchvision:{name}: torchvision has no {name}; similar are "
            + ", ".join(get_close_matches(name, known, 5, 0))
        )
    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    return builder


def _users(path: str, options: Mapping[str, Any]) -> tuple[nn.Module, bytes]:
    """Call the user's function; return its module, and the source that it was read from."""
    what = f"train.model.name = module:{path}"
    package, _, attribute = path.rpartition(".")
    if package.split(".")[0] in sys.stdlib_module_names:
        raise InputError(f"{what}: is part of Python, no function that makes a network")
    try:
        with _working_directory_on_path():
            function = getattr(importlib.import_module(package), attribute, None)
    except Exception as error:  # whatever importing the user's code raises
        raise InputError(f"{what}: {package} cannot be imported ({_reason(error)})") from error
    if not callable(function):
        raise InputError(f"{what}: {package} has no function {attribute}")
    accepted = inspect.signature(function).parameters
    anything = any(each.kind is each.VAR_KEYWORD for each in accepted.values())
    given = {name: value for name, value in options.items() if anything or name in accepted}
    try:
        module = function(**given)
    except InputError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"{what}: failed for {given} ({_reason(error)})") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{what}: returned {type(module).__name__}, not a torch.nn.Module")
    try:
        return module, Path(inspect.getfile(function)).read_bytes()
    except (TypeError, OSError):  # not from a file
        return module, b""


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    added = str(Path.cwd())
    present = added in sys.path
    if not present:
        sys.path.insert(0, added)
    try:
        yield
    finally:
        if not present:
            sys.path.remove(added)


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
