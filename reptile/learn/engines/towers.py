"""Towers: each one's features are computed by the engine that suits it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reptile.data.dataset import Inputs
from reptile.learn.engines.base import Engine
from reptile.learn.engines.eager import EagerEngine
from reptile.minibatches import IntArray
from reptile.models import Statistics
from reptile.models.towers import Towers, moments
from reptile.settings import OptimizerSettings


class TowersEngine(EagerEngine):
    """The eager engine, but for features.

    Args:
        engines: one for each tower.
    """

    def __init__(
        self,
        model: Towers,
        engines: Sequence[Engine],
        optimizer: OptimizerSettings,
        inputs: Inputs,
        device: torch.device,
    ) -> None:
        super().__init__(model, optimizer, inputs, device)
        self.name = "; ".join(engine.name for engine in engines)
        self._towers, self._engines = model, engines

    def features(
        self, weights: Tensor, rows: IntArray, statistics: Statistics | None = None
    ) -> Tensor:
        """Return the features [N, D] of rows [N], each tower's by its own engine, then joined."""
        parts = [
            engine.features(part, rows, given)
            for engine, part, given in zip(
                self._engines,
                self._towers.split(weights),
                self._towers.split_statistics(statistics),
                strict=True,
            )
        ]
        return self._towers.join(parts, statistics)

    def statistics(self, weights: Tensor, rows: IntArray) -> Statistics:
        """Return the statistics on rows [N]: each tower's, then those of the towers' features."""
        parts, own = [], []
        for engine, part in zip(self._engines, self._towers.split(weights), strict=True):
            own.append(engine.statistics(part, rows))
            parts.append(engine.features(part, rows, own[-1] or None))
        return (*(layer for each in own for layer in each), *moments(parts))
