"""Which parameters of a module are adapted to a task and meta-trained: `train.adapt`."""

from fnmatch import fnmatchcase

from torch import nn

from reptile.errors import InputError
from reptile.models.forward_order import NORMS, ForwardPass
from reptile.settings import Adapt, LastBlocks


def adapted_parameters(
    module: nn.Module, adapt: Adapt, forward: ForwardPass, *, has_head: bool, name: str
) -> set[str]:
    """Return the names of the parameters to adapt; those that need no gradient stay fixed.

    Args:
        module: the network.
        adapt: the setting.
        forward: a pass of the module.
        has_head: whether the module has outputs for a task; without, `head` adapts nothing.
        name: of the network, for messages.

    Raises:
        InputError: a pattern without a parameter, or more blocks than there are.
    """
    learnable = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if adapt == "all":
        return set(learnable)
    if adapt == "none":
        return set()
    if isinstance(adapt, tuple):
        chosen = set()
        for pattern in adapt:
            matched = {each for each in learnable if fnmatchcase(each, pattern)}
            if not matched:
                raise InputError(
                    f"train.adapt: no parameter of {name} matches {pattern!r}; they are "
                    f"{_some(list(learnable))}"
                )
            chosen |= matched
        return chosen
    parts = [forward.last.name] if has_head and forward.last else []
    if adapt == "norms":
        parts += [each for each, part in module.named_modules() if isinstance(part, NORMS)]
    elif isinstance(adapt, LastBlocks):
        blocks = forward.blocks(module)
        if adapt.last > len(blocks):
            raise InputError(
                f"train.adapt = {{last: {adapt.last}}}: {name} has {len(blocks)} blocks below its "
                "head; use at most that, or all"
            )
        parts += [part for block in blocks[-adapt.last :] for part in block]
    # By identity, not by name: one of tied weights has the other's name.
    chosen_ids = {id(value) for part in parts for value in module.get_submodule(part).parameters()}
    return {each for each, value in learnable.items() if id(value) in chosen_ids}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
