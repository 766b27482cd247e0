"""Any `torch.nn.Module` as a network: a pure function of its parameters.

The module is copied, so that training never changes it. Its copy runs in evaluation mode (dropout
is off) but for batch norm, which uses each batch's statistics, as in the paper, and keeps no
running ones. Parameters that need no gradient, and buffers, stay as they are.
"""

import copy
import math
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reptile.errors import InputError
from reptile.models.base import LayerStatistics, Params, Statistics
from reptile.objectives import Objective

BatchNorm = nn.modules.batchnorm._BatchNorm


class ModuleNetwork:
    """A user's module, wrapped; see `Model` for what each member is.

    Args:
        module: maps inputs [B, *image_shape] to [B, outputs], or to features of any shape.
        image_shape: of one input.
        outputs: number that the data needs: classes per task, or values; 0 for a module without a
            head, whose outputs, flattened, are the features.
        objective: what the outputs are for.

    Raises:
        InputError: it has no trainable parameters, or does not map such inputs to such outputs.
    """

    def __init__(
        self, module: nn.Module, image_shape: tuple[int, ...], outputs: int, objective: Objective
    ) -> None:
        self.name = f"{type(module).__module__}.{type(module).__qualname__}"
        self.image_shape, self.outputs, self.objective = image_shape, outputs, objective
        if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
            raise InputError(
                f"{self.name}: has lazy layers without a shape; pass a batch through it first"
            )
        self.module = copy.deepcopy(module).cpu().float().eval()
        self.feature_size, self._head = self._probe()
        self._norms = _replace_batch_norms(self.module)
        parameters = dict(self.module.named_parameters())
        self._learnt = {name: value for name, value in parameters.items() if value.requires_grad}
        if not self._learnt:
            raise InputError(f"{self.name}: no parameter needs a gradient: nothing can be learnt")
        self._fixed = {
            **{name: value for name, value in parameters.items() if name not in self._learnt},
            **dict(self.module.named_buffers()),
        }
        self._initial = nn.utils.parameters_to_vector(self._learnt.values()).detach().clone()

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the parameters that need a gradient, in the module's order."""
        return {name: value.shape for name, value in self._learnt.items()}

    @property
    def has_batch_norm(self) -> bool:
        """See `Model.has_batch_norm`."""
        return bool(self._norms)

    @property
    def ends_with_output_bias(self) -> bool:
        """See `Model.ends_with_output_bias`; for one that does, see `MaskedNetwork`."""
        return False

    @property
    def norm_names(self) -> tuple[str, ...]:
        """Names of the batch norms, in the order of `statistics`."""
        names = {module: name for name, module in self.module.named_modules()}
        return tuple(names[norm] for norm in self._norms)

    def initialise(self, seed: int) -> Tensor:
        """Return the module's original weights, whatever the seed."""
        return self._initial.clone()

    def start_from(self, weights: Tensor) -> None:
        """Replace the module's original weights by [P]."""
        self._initial = weights.clone()

    def forward(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """See `Model.forward`."""
        for norm, given in zip(self._norms, statistics or (), strict=statistics is not None):
            norm.given = given
        try:
            return self._call(params, images)
        finally:
            for norm in self._norms:
                norm.given = None

    def features(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """See `Model.features`: the input of the last `nn.Linear` that runs, flattened.

        A module without a head or without a linear layer gives its outputs.
        """
        if not self._head:
            return self.forward(params, images, statistics)
        seen: list[Tensor] = []
        head = self.module.get_submodule(self._head)
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.forward(params, images, statistics)
        finally:
            hook.remove()
        return seen[-1].flatten(1)

    def statistics(self, params: Params, images: Tensor) -> Statistics:
        """See `Model.statistics`: one entry a batch norm, in the order the module lists them."""
        for norm in self._norms:
            norm.keeps = True
        try:
            self._call(params, images)
            return tuple(norm.measured() for norm in self._norms)
        finally:
            for norm in self._norms:
                norm.keeps, norm.seen = False, None

    @torch.no_grad()
    def with_weights(self, params: Params) -> nn.Module:
        """Return a copy of the module that holds these weights; its batch norm runs as here."""
        module = copy.deepcopy(self.module)
        for name, value in module.named_parameters():
            if name in params:
                value.copy_(params[name])
        return module

    def _call(self, params: Params, images: Tensor) -> Tensor:
        fixed = {
            name: value.to(images.device, images.dtype if value.is_floating_point() else None)
            for name, value in self._fixed.items()
        }
        outputs: Tensor = functional_call(self.module, {**fixed, **params}, (images,))
        return outputs if self.outputs else outputs.flatten(1)

    @torch.no_grad()
    def _probe(self) -> tuple[int, str]:
        """Run the module once; return the number of its features, and its head's name or `""`."""
        inputs = torch.zeros(2, *self.image_shape)
        ran: list[tuple[str, Tensor]] = []
        hooks = [
            each.register_forward_pre_hook(lambda _, seen, name=name: ran.append((name, seen[0])))
            for name, each in self.module.named_modules()
            if isinstance(each, nn.Linear)
        ]
        try:
            outputs = self.module(inputs)
        except Exception as error:  # whatever the module's code raises
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(
                f"{self.name}: inputs of shape {list(inputs.shape)} do not pass ({reason})"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        expected = [2, self.outputs] if self.outputs else [2, "..."]
        if shape != expected and (self.outputs or not isinstance(shape, list) or shape[:1] != [2]):
            wanted = "one output for each class, or for each value" if self.outputs else "features"
            raise InputError(
                f"{self.name}: maps inputs {list(inputs.shape)} to {shape}; the tasks need "
                f"{expected}: {wanted}"
            )
        head, features = ran[-1] if ran and self.outputs else ("", outputs)
        if len(features) != 2:  # a linear layer that runs over the parts of an input
            head, features = "", outputs
        return math.prod(features.shape[1:]), head


class _BatchStatisticsNorm(nn.Module):
    """Batch norm on each batch's statistics or given ones; no running statistics."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.given: LayerStatistics | None = None
        self.keeps = False
        self.seen: LayerStatistics | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.keeps:
            axes = [0, *range(2, x.dim())]
            variance_here, mean_here = torch.var_mean(x, dim=axes, correction=0)
            self.seen = LayerStatistics(mean_here, variance_here)
        given = self.given
        mean, variance = (given.mean, given.variance) if given else (None, None)
        # Not F.batch_norm: that refuses a single value a channel, which has a variance of 0.
        return torch.batch_norm(
            x, self.weight, self.bias, mean, variance, given is None, 0.0, self.eps, False
        )

    def measured(self) -> LayerStatistics:
        if self.seen is None:
            raise InputError("a batch norm of the module takes no part in its forward pass")
        return self.seen


def _replace_batch_norms(module: nn.Module) -> list[_BatchStatisticsNorm]:
    """Replace every batch norm in place; return the replacements, one for each."""
    norms: dict[nn.Module, _BatchStatisticsNorm] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNorm):
                norms.setdefault(child, _BatchStatisticsNorm(child))
                setattr(parent, name, norms[child])
    return list(norms.values())
