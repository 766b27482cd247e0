"""Several networks side by side: their features, standardised and joined, for a closed-form head.

Each feature is standardised: in training by its mean and variance over an episode's images, after
it by those over a sample of the training split, which are kept with the checkpoint. The variance is
shrunk towards the tower's mean variance: features that hardly vary in training are no less noisy on
other data, and dividing by their own deviation costs six points on it. A tower's share is the part
of the joined features' mean square that its own make up; in training all are equal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reptile.models.base import LayerStatistics, Model, Params, Statistics, unflatten
from reptile.models.module import ModuleNetwork
from reptile.models.pretrained import PretrainedNetwork
from reptile.objectives import Objective

MEAN_SQUARE = 10.0  # of an input's joined features, summed; suits a ridge strength of 1
SMALLEST = 1e-6  # variance of a tower whose features do not vary at all


@dataclass(frozen=True)
class Towers:
    """Networks without heads, side by side; see `Model` for what each member is."""

    towers: tuple[Model, ...]
    image_shape: tuple[int, ...]
    objective: Objective
    name: str = "towers"
    outputs: int = 0
    has_batch_norm: bool = True
    head_bias: str = ""

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The towers' names, after its place each: 0.conv1.weight and so on."""
        return {
            f"{place}.{name}": shape
            for place, tower in enumerate(self.towers)
            for name, shape in tower.shapes.items()
        }

    @property
    def feature_size(self) -> int:
        """D, the number of features of all towers together."""
        return sum(tower.feature_size for tower in self.towers)

    @property
    def fixed(self) -> dict[str, Tensor]:
        """Parameters and buffers of the towers that never change, by name."""
        return {
            f"{place}.{name}": value
            for place, tower in enumerate(self.towers)
            if isinstance(tower, ModuleNetwork | PretrainedNetwork)
            for name, value in tower.fixed.items()
        }

    @property
    def weights_sha256(self) -> str:
        """Hashes of the weights that were loaded, for each tower; empty for none."""
        loaded = [getattr(tower, "weights_sha256", "") for tower in self.towers]
        return " ".join(each or "-" for each in loaded) if any(loaded) else ""

    def initialise(self, seed: int) -> Tensor:
        """Return the towers' weights before any training, one after another, float32 [P]."""
        return torch.cat([tower.initialise(seed) for tower in self.towers])

    def start_from(self, weights: Tensor, fixed: Mapping[str, Tensor]) -> None:
        """Replace the towers' original weights by [P], and what never changes."""
        for place, (tower, part) in enumerate(zip(self.towers, self.split(weights), strict=True)):
            if isinstance(tower, ModuleNetwork | PretrainedNetwork):
                tower.start_from(part, _of(place, fixed))

    def split(self, weights: Tensor) -> Sequence[Tensor]:
        """Part weights [P] into those of each tower."""
        return torch.split(
            weights,
            [sum(shape.numel() for shape in tower.shapes.values()) for tower in self.towers],
        )

    def forward(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Return the features [B, D]: there is no head."""
        return self.features(params, images, statistics)

    def features(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Map inputs [B, *image_shape] to the towers' features, joined to [B, D]."""
        given = self.split_statistics(statistics)
        parts = [
            tower.features(_of(place, params), images, given[place])
            for place, tower in enumerate(self.towers)
        ]
        return self.join(parts, statistics)

    def statistics(self, params: Params, images: Tensor) -> Statistics:
        """Return the statistics on this batch: each tower's, then those of the towers' features."""
        layers: list[LayerStatistics] = []
        parts = []
        for place, tower in enumerate(self.towers):
            own = tower.statistics(_of(place, params), images)
            parts.append(tower.features(_of(place, params), images, own or None))
            layers += own
        return (*layers, *moments(parts))

    def join(self, parts: Sequence[Tensor], statistics: Statistics | None = None) -> Tensor:
        """Standardise the towers' features [B, D_t], and join them to [B, D].

        Args:
            parts: the features of each tower.
            statistics: this network's; None for those of these features.
        """
        measured = statistics[-len(parts) :] if statistics else moments(parts)
        scaled = []
        for part, (mean, variance) in zip(parts, measured, strict=True):
            scaled.append((part - mean) / variance.sqrt())
        return torch.cat(scaled, dim=-1)

    def split_statistics(self, statistics: Statistics | None) -> list[Statistics | None]:
        """Return what of this network's statistics is each tower's."""
        if statistics is None:
            return [None] * len(self.towers)
        given, start = [], 0
        for layers in self._layers:
            given.append(statistics[start : start + layers] or None)
            start += layers
        return given

    def weigh(self, statistics: Statistics, shares: Sequence[float]) -> Statistics:
        """Return statistics under which the towers have these shares, instead of equal ones.

        A share of 0 makes a tower's features 0.
        """
        start = len(statistics) - len(self.towers)
        weighed = []
        for (mean, variance), share in zip(statistics[start:], shares, strict=True):
            weight = share * len(shares)
            weighed.append(
                LayerStatistics(mean, variance / weight if weight else variance + torch.inf)
            )
        return (*statistics[:start], *weighed)

    @cached_property
    def _layers(self) -> list[int]:
        """How many batch norms each tower has that need statistics."""
        images = torch.zeros(2, *self.image_shape)
        return [
            len(tower.statistics(unflatten(tower, tower.initialise(0)), images))
            if tower.has_batch_norm
            else 0
            for tower in self.towers
        ]


def moments(parts: Sequence[Tensor]) -> Statistics:
    """Return what standardises the features [B, D_t] of each tower to equal shares.

    The mean, and the variance: shrunk, and in such a unit that what is divided by its root has the
    mean square of a share.
    """
    statistics = []
    for part in parts:
        variance = part.var(0, correction=0)
        shrunk = variance + variance.mean().clamp(min=SMALLEST)
        unit = len(parts) * (variance / shrunk).sum().clamp(min=SMALLEST) / MEAN_SQUARE
        statistics.append(LayerStatistics(part.mean(0), shrunk * unit))
    return tuple(statistics)


def _of(place: int, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is named after a tower's place, under the names that it has in the tower."""
    prefix = f"{place}."
    return {
        name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)
    }
