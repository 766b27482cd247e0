"""How a network is written into the graphs: in the form that runs fast, or as it is.

`Rows` restates conv4 and mlp for ONNX Runtime; `AsItIs` traces any other network. `graphs` needs
no more than this interface.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reptile.export.fold import adapted_tensors, predict_adapted
from reptile.export.rows import Layout, indices, logits
from reptile.export.tracing import BATCH, Traced, trace
from reptile.models import (
    MLP,
    Conv4,
    MaskedNetwork,
    Model,
    ModuleNetwork,
    Params,
    size,
    unflatten,
)
from reptile.models.cut import split


class Form(Protocol):
    """A network, its weights packed as the loop carries them."""

    @property
    def model(self) -> Model:
        """The network; `pack` leaves the bias of its outputs where it is."""

    @property
    def module(self) -> nn.Module:
        """The module that runs in a step, to name its parts; an empty one for none."""

    @property
    def size(self) -> int:
        """Return P, the length of the packed weights."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one of the loop's inputs: what `fixed` makes of an image."""

    def pack(self, weights: Tensor) -> Tensor:
        """Return a flat vector [P] of the model in packed order."""

    def unpack(self, packed: Tensor) -> Tensor:
        """Return a packed vector [P] in the order of the model."""

    def fixed(self, images: Tensor) -> Tensor:
        """Run what no step changes, once for all images [N, *image_shape]."""

    def logits(self, packed: Tensor, inputs: Tensor, share: Tensor) -> Tensor:
        """Map a mini-batch [B, *input_shape] to logits [B, outputs]; `share` is 1/B, []."""

    def features(self, params: Params, inputs: Tensor) -> Tensor:
        """Return the features [N, D] of the loop's inputs, as `Model.features` does."""

    def adapted(self, params: Params, inputs: Tensor) -> dict[str, Tensor]:
        """Return what `adapt` hands to `predict_adapted`; inputs are the support set's."""

    def predict(self, params: Params, images: Tensor) -> Tensor:
        """Return the logits before adaptation; batch norm uses the given images."""

    def predict_adapted(self, tensors: Params, images: Tensor) -> Tensor:
        """Return the logits under what `adapted` returned."""

    def parts(self) -> list[Traced]:
        """Return the traced graphs of what `logits` does not hold."""

    def trace_all(self, *, features: bool) -> None:
        """Trace what `graphs` will need: inside of torch.export it is too late."""


def form_of(model: Model) -> Form:
    """Return the form that a network is exported in.

    Raises:
        InputError: it cannot be traced.
    """
    if isinstance(model, Conv4 | MLP):
        return Rows(model)
    assert isinstance(model, ModuleNetwork | MaskedNetwork)
    return AsItIs(model)


class Rows:
    """conv4 and mlp as `rows` restates them."""

    def __init__(self, model: Conv4 | MLP) -> None:
        self.model: Model = model
        self.size, self.input_shape = size(model), model.image_shape
        self._network, self.module = model, nn.Module()
        self._layout, self._indices = Layout(model), indices(model)
        self.pack, self.unpack = self._layout.pack, self._layout.unpack

    def fixed(self, images: Tensor) -> Tensor:
        """Return the images as they are: every layer is adapted."""
        return images

    def logits(self, packed: Tensor, inputs: Tensor, share: Tensor) -> Tensor:
        """Map a mini-batch [B, *input_shape] to logits [B, outputs]; `share` is 1/B, []."""
        return logits(self._network, self._layout.named(packed), inputs, share, self._indices)

    def features(self, params: Params, inputs: Tensor) -> Tensor:
        """Return the features [N, D] of the loop's inputs, as `Model.features` does."""
        return self.model.features(params, inputs)

    def adapted(self, params: Params, inputs: Tensor) -> dict[str, Tensor]:
        """Return what `adapt` hands to `predict_adapted`; inputs are the support set's."""
        return adapted_tensors(self.model, params, inputs)

    def predict(self, params: Params, images: Tensor) -> Tensor:
        """Return the logits before adaptation; batch norm uses the given images."""
        return self.model.forward(params, images)

    def predict_adapted(self, tensors: Params, images: Tensor) -> Tensor:
        """Return the logits under what `adapted` returned."""
        return predict_adapted(self.model, tensors, images)

    def parts(self) -> list[Traced]:
        """Return no graph: none is traced."""
        return []

    def trace_all(self, *, features: bool) -> None:
        """Trace nothing."""


class AsItIs:
    """Any network, each of its functions traced from its own code."""

    def __init__(self, model: ModuleNetwork | MaskedNetwork) -> None:
        masked = isinstance(model, MaskedNetwork)
        network = model.network if isinstance(model, MaskedNetwork) else model
        cut = split(network)
        tail = cut.tail if cut else network
        self.model: Model = model
        self.size, self.input_shape, self.module = size(model), tail.image_shape, tail.module
        self._network, self._cut = network, cut
        self._tail: Model = MaskedNetwork(tail) if masked else tail
        self._params = {name: torch.zeros(shape) for name, shape in model.shapes.items()}
        with torch.no_grad():
            images = torch.zeros(BATCH, *model.image_shape)
            self._tensors = adapted_tensors(model, self._params, images)

    def pack(self, weights: Tensor) -> Tensor:
        """Return the vector [P] as it is: the packed order is the model's."""
        return weights

    def unpack(self, packed: Tensor) -> Tensor:
        """Return the vector [P] as it is: the packed order is the model's."""
        return packed

    def fixed(self, images: Tensor) -> Tensor:
        """Run the part that no step changes on images [N, *image_shape]."""
        inputs: Tensor = self._fixed(images) if self._fixed else images
        return inputs

    def logits(self, packed: Tensor, inputs: Tensor, share: Tensor) -> Tensor:
        """Map a mini-batch [B, *input_shape] to logits [B, outputs]; `share` is 1/B, []."""
        return self._tail.forward(unflatten(self.model, packed), inputs)

    def features(self, params: Params, inputs: Tensor) -> Tensor:
        """Return the features [N, D] of the loop's inputs, as `Model.features` does."""
        features: Tensor = self._features(inputs, *params.values())
        return features

    def adapted(self, params: Params, inputs: Tensor) -> dict[str, Tensor]:
        """Return what `adapt` hands to `predict_adapted`; inputs are the support set's."""
        return dict(zip(self._tensors, self._adapted(inputs, *params.values()), strict=True))

    def predict(self, params: Params, images: Tensor) -> Tensor:
        """Return the logits before adaptation; batch norm uses the given images."""
        logits: Tensor = self._predict(images, *params.values())
        return logits

    def predict_adapted(self, tensors: Params, images: Tensor) -> Tensor:
        """Return the logits under what `adapted` returned."""
        logits: Tensor = self._predict_adapted(images, *tensors.values())
        return logits

    def parts(self) -> list[Traced]:
        """Return the graph of the fixed part, if there is one."""
        return [self._fixed] if self._fixed else []

    def trace_all(self, *, features: bool) -> None:
        """Trace what `graphs` will need: inside of torch.export it is too late."""
        _ = self._fixed, self._adapted, self._predict, self._predict_adapted
        _ = features and self._features

    @cached_property
    def _fixed(self) -> Traced | None:
        if self._cut is None:
            return None
        images = torch.zeros(BATCH, *self.model.image_shape)
        return trace(self._cut.fixed, (images,), (0,), self._cut.fixed)

    @cached_property
    def _features(self) -> Traced:
        return self._trace(self._tail.features, self._params, self.input_shape)

    @cached_property
    def _adapted(self) -> Traced:
        def run(params: Params, inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(adapted_tensors(self._tail, params, inputs).values())

        return self._trace(run, self._params, self.input_shape)

    @cached_property
    def _predict(self) -> Traced:
        return self._trace(self.model.forward, self._params, self.model.image_shape)

    @cached_property
    def _predict_adapted(self) -> Traced:
        def run(tensors: Params, images: Tensor) -> Tensor:
            return predict_adapted(self.model, tensors, images)

        return self._trace(run, self._tensors, self.model.image_shape)

    def _trace(
        self, function: Callable[..., Any], tensors: Params, shape: tuple[int, ...]
    ) -> Traced:
        names = list(tensors)
        return trace(
            lambda inputs, *values: function(dict(zip(names, values, strict=True)), inputs),
            (torch.zeros(BATCH, *shape), *tensors.values()),
            (0,),
            self._network.module,
        )
