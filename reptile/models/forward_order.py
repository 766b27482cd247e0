"""What runs in a module's forward pass, and in which order: its head, and its blocks."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from reptile.errors import InputError

DOMINANT = 0.9  # a part with this share of the parameters is the network itself, not a block of it


NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
CONTAINERS = (nn.Sequential, nn.ModuleList)


class Ran(NamedTuple):
    """A module with parameters of its own that ran."""

    name: str
    module: nn.Module
    input: Tensor


class ForwardPass(NamedTuple):
    """One forward pass of two inputs."""

    outputs: Tensor
    ran: tuple[Ran, ...]  # in the order of the pass, each once

    @property
    def head(self) -> Ran | None:
        """The last `nn.Linear` that ran on one vector or map an input; None without one."""
        linear = [each for each in self.ran if isinstance(each.module, nn.Linear)]
        return linear[-1] if linear and len(linear[-1].input) == 2 else None

    @property
    def ends_in_head(self) -> bool:
        """Whether the module returns what its head gives."""
        head = self.head
        if head is None:
            return False
        with torch.no_grad():
            expected: Tensor = head.module(head.input)
        return expected.shape == self.outputs.shape and torch.allclose(expected, self.outputs)

    @property
    def last(self) -> Ran | None:
        """The head, or without one the last module that ran."""
        return self.head or (self.ran[-1] if self.ran else None)

    def blocks(self, module: nn.Module) -> list[list[str]]:
        """Group the modules below the head into blocks, in the order of the pass.

        A block is a child of the module, or of a container in it: an `nn.Sequential`, an
        `nn.ModuleList`, or a part that holds nearly all parameters. A norm between two blocks
        belongs to the first.

        Returns:
            names of the parts that make each block.
        """
        last = self.last
        names = [each.name for each in self.ran if last is None or each.name != last.name]
        total = _size(module) - (_size(last.module) if last else 0)
        opened = {
            name
            for name, part in module.named_modules()
            if type(part) in CONTAINERS
            or (
                _size(part) >= DOMINANT * total
                and any(each.startswith(f"{name}.") for each in names)
            )
        }
        blocks: list[list[str]] = []
        for name in names:
            parts = name.split(".")
            outer = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
            part = next((each for each in outer if each not in opened), "")
            if not part or any(part in block for block in blocks):
                continue
            if isinstance(module.get_submodule(part), NORMS) and blocks:
                blocks[-1].append(part)
            else:
                blocks.append([part])
        return blocks


@torch.no_grad()
def run_once(module: nn.Module, inputs: Tensor, name: str) -> ForwardPass:
    """Run a module on inputs and watch which of its parts run.

    Args:
        module: in evaluation mode.
        inputs: two inputs of the module.
        name: of the module, for messages.

    Raises:
        InputError: such inputs do not pass, or do not give a tensor.
    """
    ran: dict[str, Ran] = {}

    def watch(name: str, part: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def seen(_: nn.Module, given: tuple[object, ...]) -> None:
            first = given[0] if given and isinstance(given[0], Tensor) else torch.empty(0)
            ran.pop(name, None)  # a part that runs twice counts where it runs last
            ran[name] = Ran(name, part, first)

        return part.register_forward_pre_hook(seen)

    hooks = [
        watch(name, part)
        for name, part in module.named_modules()
        if next(part.parameters(recurse=False), None) is not None
    ]
    try:
        outputs = module(inputs)
    except Exception as error:  # whatever the module's code raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"{name}: inputs of shape {list(inputs.shape)} do not pass ({reason})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(outputs, Tensor):
        raise InputError(f"{name}: returns {type(outputs).__name__}; it must return a tensor")
    return ForwardPass(outputs, tuple(ran.values()))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
