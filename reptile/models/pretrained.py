"""One of this library's networks as a tower that starts from given weights, or stays as it is."""

from collections.abc import Mapping

import torch
from torch import Tensor

from reptile.models.base import Network, Params, Statistics, flatten, unflatten


class PretrainedNetwork:
    """A network without a head, and where it starts; see `Model` for what each member is.

    Batch norm's statistics belong to the data and are measured with those of the towers.

    Args:
        network: without a head.
        weights: of all its parameters, by name.
        frozen: whether they never change.
        weights_sha256: hash of the weights that were loaded; empty if they were drawn.
    """

    def __init__(
        self, network: Network, weights: Params, *, frozen: bool, weights_sha256: str
    ) -> None:
        self.network, self.frozen, self.weights_sha256 = network, frozen, weights_sha256
        self.name, self.outputs, self.objective = network.name, 0, network.objective
        self.image_shape, self.feature_size = network.image_shape, network.feature_size
        self.has_batch_norm, self.head_bias = network.has_batch_norm, ""
        self.shapes: dict[str, torch.Size] = {} if frozen else network.shapes
        self._start = {name: weights[name].clone() for name in network.shapes}

    @property
    def fixed(self) -> dict[str, Tensor]:
        """The parameters that never change, by name."""
        return self._start if self.frozen else {}

    def initialise(self, seed: int) -> Tensor:
        """Return the given weights, whatever the seed; none where they are frozen."""
        return torch.empty(0) if self.frozen else flatten(self.network, self._start)

    def start_from(self, weights: Tensor, fixed: Mapping[str, Tensor]) -> None:
        """Replace the given weights by [P], or by those that never change."""
        start = fixed if self.frozen else unflatten(self.network, weights)
        self._start = {name: start[name].clone() for name in self.network.shapes}

    def forward(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """See `Model.forward`: the features."""
        return self.features(params, images, statistics)

    def features(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """See `Model.features`."""
        return self.network.features(self._all(params, images), images, statistics)

    def statistics(self, params: Params, images: Tensor) -> Statistics:
        """See `Model.statistics`."""
        return self.network.statistics(self._all(params, images), images)

    def _all(self, params: Params, images: Tensor) -> Params:
        if not self.frozen:
            return params
        return {name: value.to(images) for name, value in self._start.items()}
