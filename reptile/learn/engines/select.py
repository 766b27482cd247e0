"""Which engine runs: the one that the settings name, or the fastest that runs here."""

import torch

from reptile.data.dataset import Inputs
from reptile.errors import InputError
from reptile.learn.engines.base import Engine
from reptile.learn.engines.batched import BatchedEngine
from reptile.learn.engines.eager import EagerEngine
from reptile.learn.engines.native import BuildError, NativeEngine
from reptile.models import Model
from reptile.settings import OptimizerSettings


def make_engine(
    kind: str,
    model: Model,
    optimizer: OptimizerSettings,
    inputs: Inputs,
    device: torch.device,
) -> Engine:
    """Return the engine that the settings name; `auto` takes the fastest that runs here.

    Raises:
        InputError: `native` is asked for, and it does not run on this device or machine.
    """
    if kind == "eager":
        return EagerEngine(model, optimizer, inputs, device)
    if kind == "batched" or (kind == "auto" and device.type != "cpu"):
        return BatchedEngine(model, optimizer, inputs, device)
    if device.type != "cpu":
        raise InputError(f"train.engine = native: runs on the cpu, not on {device}; use auto")
    try:
        return NativeEngine(model, optimizer, inputs)
    except BuildError as error:
        if kind == "native":
            raise InputError(f"train.engine = native: {error}; or use auto") from None
        eager = EagerEngine(model, optimizer, inputs, device)
        eager.name += f" (several times slower than native: {error})"
        return eager
