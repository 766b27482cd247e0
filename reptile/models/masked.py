"""A network whose outputs can be taken out of the softmax, for tasks of fewer classes."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.models.base import Params, Statistics
from reptile.models.module import ModuleNetwork

OUTPUT_MASK = "output_mask"


class MaskedNetwork:
    """A module with a bias on its outputs that is never learnt, the last of its weights.

    It is 0, or `MASK_BIAS` where `mask_absent_outputs` has taken an output out, in place of the
    bias of a head that there may not be. See `Model` for what each member is.
    """

    def __init__(self, network: ModuleNetwork) -> None:
        self.network = network
        self.name, self.outputs = network.name, network.outputs
        self.image_shape, self.objective = network.image_shape, network.objective
        self.has_batch_norm, self.norm_names = network.has_batch_norm, network.norm_names
        self.feature_size = network.feature_size

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the weights: the module's, then `output_mask` [outputs]."""
        return {**self.network.shapes, OUTPUT_MASK: torch.Size((self.outputs,))}

    @property
    def head_bias(self) -> str:
        """The mask [outputs], which is added to the outputs."""
        return OUTPUT_MASK

    def initialise(self, seed: int) -> Tensor:
        """Return the weights before any training, float32 [P]; no output is masked."""
        return self.extend(self.network.initialise(seed))

    def extend(self, vector: Tensor) -> Tensor:
        """Append zeros for the mask to flat vectors [..., P] of the module."""
        return F.pad(vector, (0, self.outputs))

    def forward(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Map inputs [B, *image_shape] to logits or values [B, outputs] plus the mask."""
        mask = params[OUTPUT_MASK].detach()
        return self.network.forward(self._without_mask(params), images, statistics) + mask

    def features(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Map inputs [B, *image_shape] to what the head sees, [B, D], by the module."""
        return self.network.features(self._without_mask(params), images, statistics)

    def statistics(self, params: Params, images: Tensor) -> Statistics:
        """Return the module's statistics on this batch."""
        return self.network.statistics(self._without_mask(params), images)

    def _without_mask(self, params: Params) -> Params:
        return {name: value for name, value in params.items() if name != OUTPUT_MASK}
