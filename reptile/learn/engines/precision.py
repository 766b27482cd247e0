"""Mixed precision: a network's products and convolutions in bfloat16, all else in float32."""

from typing import Any

import torch
from torch import Tensor

from reptile.models import Model, Params, Statistics
from reptile.settings import Precision


class MixedPrecision:
    """A network that runs under torch.autocast, with outputs, and gradients by weights, of float32.

    The weights, the optimiser, the loss and a closed-form head stay in float32. So do the
    statistics of batch norm that are kept.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self._model, self._device = model, device

    def __getattr__(self, name: str) -> Any:
        """Return what does not compute as the network has it."""
        return getattr(self._model, name)

    def forward(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """See `Model.forward`."""
        with self._autocast():
            outputs = self._model.forward(params, images, statistics)
        return outputs.to(images.dtype)

    def features(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """See `Model.features`."""
        with self._autocast():
            features = self._model.features(params, images, statistics)
        return features.to(images.dtype)

    def _autocast(self) -> torch.autocast:
        # No cache: weights differ from call to call, and a captured graph could not replay it.
        return torch.autocast(self._device.type, torch.bfloat16, cache_enabled=False)


def in_precision(model: Model, precision: Precision, device: torch.device) -> Model:
    """Return a network that computes in the precision that the settings name."""
    return MixedPrecision(model, device) if precision == "bf16" else model
