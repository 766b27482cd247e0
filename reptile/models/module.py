"""Any `torch.nn.Module` as a network: a pure function of its parameters.

The module is copied, so that training never changes it. Its copy runs in evaluation mode: dropout
is off. Parameters that are not adapted, and buffers, stay as they are. Batch norm with adapted
parameters uses each batch's statistics, as in the paper; fixed batch norm keeps its running ones.
"""

import copy
import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reptile.errors import InputError
from reptile.models.adapted import adapted_parameters
from reptile.models.base import LayerStatistics, Params, Statistics
from reptile.models.forward_order import ForwardPass, run_once
from reptile.objectives import Objective
from reptile.settings import Adapt

BatchNorm = nn.modules.batchnorm._BatchNorm


class ModuleNetwork:
    """A user's module, wrapped; see `Model` for what each member is.

    Args:
        module: maps inputs [B, *image_shape] to [B, outputs], or to features of any shape.
        image_shape: of one input.
        outputs: number that the data needs: classes per task, or values; 0 for a module without a
            head, whose outputs, flattened, are the features.
        objective: what the outputs are for.
        adapt: which of the parameters that need a gradient are adapted and meta-trained; all others
            are fixed.
        preprocess: runs before the module, without parameters.
        name: in messages; the module's class by default.
        weights_sha256: hash of the weights that were loaded; empty for none.

    Raises:
        InputError: it has no trainable parameters, or does not map such inputs to such outputs.
    """

    def __init__(
        self,
        module: nn.Module,
        image_shape: tuple[int, ...],
        outputs: int,
        objective: Objective,
        *,
        adapt: Adapt = "all",
        preprocess: nn.Module | None = None,
        name: str = "",
        weights_sha256: str = "",
    ) -> None:
        self.name = name or f"{type(module).__module__}.{type(module).__qualname__}"
        self.image_shape, self.outputs, self.objective = image_shape, outputs, objective
        self.preprocess, self.weights_sha256 = preprocess, weights_sha256
        if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
            raise InputError(
                f"{self.name}: has lazy layers without a shape; pass a batch through it first"
            )
        self.module = copy.deepcopy(module).cpu().float().eval()
        forward = self._probe()
        adapted = adapted_parameters(
            self.module, adapt, forward, has_head=outputs > 0, name=self.name
        )
        head = forward.head if outputs else None
        self._head = head.name if head else ""
        features = head.input if head else forward.outputs
        self.feature_size = math.prod(features.shape[1:])
        bias = f"{self._head}.bias"
        self.head_bias = bias if bias in adapted and forward.ends_in_head else ""
        parameters = dict(self.module.named_parameters())
        for each, value in parameters.items():
            value.requires_grad_(each in adapted)
        _replace_batch_norms(self.module)
        _disable_in_place(self.module)
        self._norms = [
            each for each in self.module.modules() if isinstance(each, BatchStatisticsNorm)
        ]
        self._learnt = {name: value for name, value in parameters.items() if value.requires_grad}
        if not self._learnt and outputs:
            raise InputError(f"{self.name}: no parameter needs a gradient: nothing can be learnt")
        self.fixed: dict[str, Tensor] = {
            **{name: value for name, value in parameters.items() if name not in self._learnt},
            **dict(self.module.named_buffers()),
        }
        """Parameters and buffers that never change, by name."""
        self.names = set(parameters)
        """Of all parameters that run."""
        self._initial = torch.cat(
            [torch.empty(0), *(value.detach().flatten() for value in self._learnt.values())]
        )

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the adapted parameters, in the module's order."""
        return {name: value.shape for name, value in self._learnt.items()}

    @property
    def has_batch_norm(self) -> bool:
        """Whether a prediction depends on the statistics of a batch."""
        return bool(self._norms)

    @property
    def norm_names(self) -> tuple[str, ...]:
        """Names of the batch norms, in the order of `statistics`."""
        names = {module: name for name, module in self.module.named_modules()}
        return tuple(names[norm] for norm in self._norms)

    def initialise(self, seed: int) -> Tensor:
        """Return the module's original weights, whatever the seed."""
        return self._initial.clone()

    @torch.no_grad()
    def start_from(self, weights: Tensor, fixed: Mapping[str, Tensor]) -> None:
        """Replace the module's original weights by [P], and what never changes."""
        self._initial = weights.clone()
        for name, value in self.fixed.items():
            value.copy_(fixed[name])

    def forward(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Map inputs [B, *image_shape] to logits or values [B, outputs]."""
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
        """Return the input of the last `nn.Linear` that runs, flattened to [B, D].

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
        """Return each batch norm's statistics on this batch, in the order the module lists them."""
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
        return nn.Sequential(self.preprocess, module) if self.preprocess else module

    def _call(self, params: Params, images: Tensor) -> Tensor:
        fixed = {
            name: value.to(images.device, images.dtype if value.is_floating_point() else None)
            for name, value in self.fixed.items()
        }
        inputs = self.preprocess(images) if self.preprocess else images
        learnt = {name: params[name] for name in self.shapes if name in self.names}
        outputs: Tensor = functional_call(self.module, {**fixed, **learnt}, (inputs,))
        return outputs if self.outputs else outputs.flatten(1)

    def _probe(self) -> ForwardPass:
        """Run the module once and check what it returns."""
        inputs = torch.rand(2, *self.image_shape, generator=torch.Generator().manual_seed(0))
        seen = self.preprocess(inputs) if self.preprocess else inputs
        forward = run_once(self.module, seen, self.name)
        shape = list(forward.outputs.shape)
        if shape[:1] != [2] or (self.outputs and shape[1:] != [self.outputs]):
            needed = (
                f"{[2, self.outputs]}: one output for each class, or for each value"
                if self.outputs
                else "features for each input"
            )
            raise InputError(
                f"{self.name}: maps inputs {list(inputs.shape)} to {shape}; the tasks need {needed}"
            )
        return forward


class BatchStatisticsNorm(nn.Module):
    """Batch norm on each batch's statistics or given ones; no running statistics."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.given: LayerStatistics | None = None
        self.keeps = False
        self.seen: LayerStatistics | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, F, ...] over all but its second axis."""
        if self.weight is not None:
            x = x.to(self.weight.dtype)  # in mixed precision it is less precise
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
        """Return the statistics of the last batch."""
        if self.seen is None:
            raise InputError("a batch norm of the module takes no part in its forward pass")
        return self.seen


def _replace_batch_norms(module: nn.Module) -> None:
    """Replace, in place, the batch norms that use the statistics of a batch.

    Those with fixed parameters and running statistics keep these. Without parameters it depends on
    whether anything in the module is fixed: a part that was trained before keeps what it has seen.
    """
    whole = all(parameter.requires_grad for parameter in module.parameters())
    norms: dict[nn.Module, BatchStatisticsNorm] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, BatchNorm):
                continue
            learnt = any(parameter.requires_grad for parameter in child.parameters())
            if learnt or whole or child.running_mean is None:
                norms.setdefault(child, BatchStatisticsNorm(child))
                setattr(parent, name, norms[child])


def _disable_in_place(module: nn.Module) -> None:
    """Let no activation overwrite its input, which may be cached, or shared by tasks under vmap."""
    for part in module.modules():
        if hasattr(part, "inplace"):
            setattr(part, "inplace", False)  # noqa: B010  # torch types it as a module
