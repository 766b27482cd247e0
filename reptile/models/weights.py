"""Weights to start from: read from a file or from torchvision, checked, and put into a module."""

import hashlib
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from reptile.errors import InputError, PlatformError

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

log = logging.getLogger(__name__)

IN_CHECKPOINT = "weights/"  # before the names of parameters in a checkpoint
ONLY = "0."  # before those of the only tower; any further tower's are refused
BESIDE_NETWORK = (
    "head.",
    "classifier.",
    "step_size.",
)  # what is learnt beside a network's features
NESTED = ("state_dict", "model")  # where training scripts put the weights in a .pth file


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file, or from a .pth file, of which no code is run.

    Raises:
        InputError: missing, damaged, or of another format.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load(path.read_bytes()))
        if path.suffix in {".pth", ".pt"}:
            values = torch.load(path, map_location="cpu", weights_only=True)
            for name in NESTED:
                if isinstance(values, Mapping) and isinstance(values.get(name), Mapping):
                    values = values[name]
            if isinstance(values, Mapping) and all(isinstance(v, Tensor) for v in values.values()):
                return dict(values)
            raise InputError(f"{path}: holds no state dict: save one with safetensors")
    except FileNotFoundError:
        raise InputError(f"train.model.weights = {path}: no such file") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: holds more than tensors, which could run code; save its state dict with "
            "safetensors"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read as weights ({reason})") from None
    raise InputError(f"train.model.weights = {path}: must be a .safetensors, .pth or .pt file")


def download(entry: "WeightsEnum", name: str) -> dict[str, Tensor]:
    """Return torchvision's weights, downloaded and checked by torchvision.

    Args:
        entry: of torchvision's table.
        name: in the settings, for messages.

    Raises:
        PlatformError: they cannot be downloaded.
    """
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True))
    except (URLError, TimeoutError, ConnectionError) as error:
        raise PlatformError(
            f"train.model.weights = {name}: cannot be downloaded ({error}); give the path of "
            "the file, or place it in torch's cache (TORCH_HOME)"
        ) from None
    except RuntimeError as error:  # another hash than the file's name says
        raise PlatformError(
            f"train.model.weights = {name}: the download is damaged ({error}); try again"
        ) from None


def weights_entry(network: str, weights: str) -> "WeightsEnum":
    """Return torchvision's entry of weights, with the transforms they were trained with.

    Raises:
        InputError: no such weights.
    """
    from torchvision.models import get_model_weights

    known = get_model_weights(network)
    try:
        return known[weights]
    except KeyError:
        names = ", ".join(["DEFAULT", *(each.name for each in known)])
        raise InputError(
            f"train.model.weights = {weights}: torchvision has for {network} {names}; or give the "
            "path of a .safetensors or .pth file"
        ) from None


def put_weights(
    module: nn.Module, weights: Mapping[str, Tensor], head: str, name: str, source: str
) -> None:
    """Copy weights into a module; a head of another size stays drawn.

    Args:
        module: to change.
        weights: by name; those of all other parameters and buffers must be there, and no more.
        head: name of the module's head.
        name: of the network, for messages.
        source: of the weights, for messages.

    Raises:
        InputError: a parameter is missing, is not one of the network's, or has another shape.
    """
    own = module.state_dict()
    in_head = {each for each in own if each.startswith(f"{head}.")} if head else set()
    if any(each not in weights or weights[each].shape != own[each].shape for each in in_head):
        log.info("%s: its head is not that of these tasks; it is drawn anew", source)
        weights = {each: value for each, value in weights.items() if each not in in_head}
    else:
        in_head = set()
    for each, value in own.items():
        if each in in_head or each.endswith("num_batches_tracked"):
            continue
        if each not in weights:
            raise InputError(f"{source}: has no {each}, which {name} needs")
        if weights[each].shape != value.shape:
            raise InputError(
                f"{source}: {each} is {list(weights[each].shape)}, {name} needs {list(value.shape)}"
            )
    if extra := sorted(set(weights) - set(own)):
        raise InputError(f"{source}: {extra[0]} is no parameter of {name}")
    module.load_state_dict(dict(weights), strict=False)


def network_weights(
    stored: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], name: str, source: str
) -> dict[str, Tensor]:
    """Return the weights of one of this library's networks, without a head.

    Args:
        stored: a state dict, or what a checkpoint's weights.safetensors holds.
        shapes: of the network's parameters; those of all must be there, and no more but a head.
        name: of the network, for messages.
        source: of the weights, for messages.

    Raises:
        InputError: a parameter is missing, is not one of the network's, or has another shape.
    """
    if of_checkpoint := {k: v for k, v in stored.items() if k.startswith(IN_CHECKPOINT)}:
        names = {key: key.removeprefix(IN_CHECKPOINT).removeprefix(ONLY) for key in of_checkpoint}
        stored = {names[key]: value for key, value in of_checkpoint.items()}
    for each, shape in shapes.items():
        if each not in stored:
            raise InputError(f"{source}: has no {each}, which {name} needs")
        if stored[each].shape != shape:
            raise InputError(
                f"{source}: {each} is {list(stored[each].shape)}, {name} needs {list(shape)}"
            )
    for each in sorted(set(stored) - set(shapes)):
        if not each.startswith(BESIDE_NETWORK):
            raise InputError(f"{source}: {each} is no parameter of {name}")
    return {each: stored[each].float() for each in shapes}


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of tensors by name, such as a module's state dict."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
