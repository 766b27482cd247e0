"""How a network is written into the graphs: in the form that runs fast, or as it is.

`Rows` restates conv4 and mlp for ONNX Runtime; `AsItIs` traces any other network. `graphs` needs
no more than this interface.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

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


class Form(Protocol):
    """A network, its weights packed as the loop carries them."""

    @property
    def model(self) -> Model:
        """The network; the bias or mask of its outputs comes last in its weights."""

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

    def adapted(self, params: Params, inputs: Tensor) -> dict[str, Tensor]:
        """Return what `adapt` hands to `predict_adapted`; inputs are the support set's."""

    def predict(self, params: Params, images: Tensor) -> Tensor:
        """Return the logits before adaptation; batch norm uses the given images."""

    def predict_adapted(self, tensors: Params, images: Tensor) -> Tensor:
        """Return the logits under what `adapted` returned."""


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
        self.model, self.size, self.input_shape = model, size(model), model.image_shape
        self._layout, self._indices = Layout(model), indices(model)
        self.pack, self.unpack = self._layout.pack, self._layout.unpack

    def fixed(self, images: Tensor) -> Tensor:
        """See `Form.fixed`: all is adapted."""
        return images

    def logits(self, packed: Tensor, inputs: Tensor, share: Tensor) -> Tensor:
        """See `Form.logits`."""
        return logits(self.model, self._layout.named(packed), inputs, share, self._indices)

    def adapted(self, params: Params, inputs: Tensor) -> dict[str, Tensor]:
        """See `Form.adapted`."""
        return adapted_tensors(self.model, params, inputs)

    def predict(self, params: Params, images: Tensor) -> Tensor:
        """See `Form.predict`."""
        return self.model.forward(params, images)

    def predict_adapted(self, tensors: Params, images: Tensor) -> Tensor:
        """See `Form.predict_adapted`."""
        return predict_adapted(self.model, tensors, images)


class AsItIs:
    """Any network, each of its functions traced from its own code."""

    def __init__(self, model: ModuleNetwork | MaskedNetwork) -> None:
        self.model, self.size, self.input_shape = model, size(model), model.image_shape
        images = torch.zeros(BATCH, *model.image_shape)
        params = {name: torch.zeros(shape) for name, shape in model.shapes.items()}
        with torch.no_grad():
            adapted = adapted_tensors(model, params, images)
        self._names = tuple(adapted)

        def run(function: Callable[..., Any], tensors: Params) -> Traced:
            names = list(tensors)
            return trace(
                lambda images, *values: function(dict(zip(names, values, strict=True)), images),
                (images, *tensors.values()),
                free=(0,),
            )

        self._predict = run(model.forward, params)
        self._adapted = run(
            lambda params, images: tuple(adapted_tensors(model, params, images).values()), params
        )
        self._predict_adapted = run(
            lambda tensors, images: predict_adapted(model, tensors, images), adapted
        )

    def pack(self, weights: Tensor) -> Tensor:
        """See `Form.pack`: the order of the model."""
        return weights

    def unpack(self, packed: Tensor) -> Tensor:
        """See `Form.unpack`: the order of the model."""
        return packed

    def fixed(self, images: Tensor) -> Tensor:
        """See `Form.fixed`."""
        return images

    def logits(self, packed: Tensor, inputs: Tensor, share: Tensor) -> Tensor:
        """See `Form.logits`."""
        return self.model.forward(unflatten(self.model, packed), inputs)

    def adapted(self, params: Params, inputs: Tensor) -> dict[str, Tensor]:
        """See `Form.adapted`."""
        return dict(zip(self._names, self._adapted(inputs, *params.values()), strict=True))

    def predict(self, params: Params, images: Tensor) -> Tensor:
        """See `Form.predict`."""
        logits: Tensor = self._predict(images, *params.values())
        return logits

    def predict_adapted(self, tensors: Params, images: Tensor) -> Tensor:
        """See `Form.predict_adapted`."""
        logits: Tensor = self._predict_adapted(images, *tensors.values())
        return logits
