"""Choice of device and engine: those that the settings name, or the fastest available."""

import os

import torch
from torch import Tensor

from reptile.data.dataset import Inputs
from reptile.errors import InputError, PlatformError
from reptile.learn.engines.base import Engine
from reptile.learn.engines.batched import BatchedEngine
from reptile.learn.engines.eager import EagerEngine
from reptile.learn.engines.native import NETWORKS, BuildError, NativeEngine
from reptile.learn.engines.towers import TowersEngine
from reptile.models import Model, ModuleNetwork, PretrainedNetwork, Towers, unflatten
from reptile.models.cut import split
from reptile.settings import OptimizerSettings, Precision


def choose_device(name: str) -> torch.device:
    """Return the device that the settings name; `auto` is CUDA where there is one.

    Raises:
        PlatformError: the settings name `cuda`, and there is no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise PlatformError("train.device = cuda: torch sees no CUDA device here; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # torchrun's, one a device


def make_engine(
    name: str,
    model: Model,
    optimizer: OptimizerSettings,
    inputs: Inputs,
    device: torch.device,
    precision: Precision = "float32",
) -> Engine:
    """Return the engine that the settings name; `auto` takes the fastest that runs this network.

    Raises:
        InputError: the settings name `native` or `batched`, which do not support this network or
            device.
        PlatformError: the settings name `native`, which cannot be built on this machine.
    """
    if isinstance(model, Towers):
        if name not in ("auto", "eager"):
            raise InputError(
                f"train.engine = {name}: each tower has its own; use auto (the fastest), or eager"
            )
        functions = [  # what a tower starts from is no part of what it computes
            each.network if isinstance(each, PretrainedNetwork) and not each.frozen else each
            for each in model.towers
        ]
        engines = [
            make_engine(name, each, optimizer, inputs, device, precision) for each in functions
        ]
        return TowersEngine(model, engines, optimizer, inputs, device)
    if name == "eager":
        return EagerEngine(model, optimizer, inputs, device, precision)
    if name == "batched" or (name == "auto" and device.type != "cpu"):
        reason = why_not_batched(model)
        if not reason:
            return BatchedEngine(model, optimizer, inputs, device, precision)
        if name == "batched":
            raise InputError(
                f"train.engine = batched: cannot run {model.name} ({reason}); use auto"
            )
        engine = EagerEngine(model, optimizer, inputs, device, precision)
        engine.name += f" (slower than batched: {reason})"
        return engine
    if name == "native" and device.type != "cpu":
        raise InputError(f"train.engine = native: runs on the cpu, not on {device}; use auto")
    scaled = optimizer.name == "scaled_sgd"  # the kernel has one step size for all parameters
    if name == "native" and scaled:
        raise InputError("train.engine = native: has no steps of scaled_sgd; use auto")
    special = type(model) not in NETWORKS or getattr(model, "preprocess", None)
    if name == "auto" and (special or scaled or precision == "bf16"):
        return EagerEngine(model, optimizer, inputs, device, precision)
    try:
        return NativeEngine(model, optimizer, inputs)
    except BuildError as error:
        if name == "native":
            raise PlatformError(f"train.engine = native: {error}; or use auto") from None
        eager = EagerEngine(model, optimizer, inputs, device, precision)
        eager.name += f" (several times slower than native: {error})"
        return eager


def why_not_batched(model: Model) -> str:
    """Return why torch.vmap cannot run a step of this network; empty if it can.

    The networks of this library are known to run.
    """
    if not isinstance(model, ModuleNetwork):
        return ""

    cut = split(model)
    network = cut.tail if cut else model

    def outputs(weights: Tensor, images: Tensor) -> Tensor:
        return network.forward(unflatten(network, weights), images)

    def total(weights: Tensor, images: Tensor) -> Tensor:
        return outputs(weights, images).square().sum()

    weights = model.initialise(0).expand(2, -1)
    images = torch.zeros(2, 2, *network.image_shape)
    try:
        torch.vmap(torch.func.grad(total))(weights, images)
        with torch.no_grad():  # where torch takes other kernels
            torch.vmap(outputs)(weights, images)
    except RuntimeError as error:
        return str(error).partition("\n")[0][:200]
    return ""
