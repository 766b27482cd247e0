"""How a table's columns become the numbers that a network sees: learnt on the training split.

Stored in dataset.json, so that later stages can do the same to raw rows. Not for reading tables
(see `readers.table`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

Columns = Mapping[str, npt.NDArray[Any]]
"""Raw columns [N] by name: float64 numbers, dates in seconds since 1970-01-01 UTC (NaN where
missing), categories as strings (None where missing)."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NumberCoding(_Frozen):
    """A number x, or a date in seconds since 1970-01-01 UTC: (x - mean) / deviation."""

    kind: Literal["number", "date"]
    column: str
    mean: float
    deviation: Annotated[float, Field(gt=0)]

    @property
    def width(self) -> int:
        """How many numbers it gives: one."""
        return 1

    def encode(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return values [N] as [N, 1]; a missing one is 0, the training split's mean."""
        scaled = (np.asarray(values, np.float64) - self.mean) / self.deviation
        return np.nan_to_num(scaled, nan=0.0, posinf=np.inf, neginf=-np.inf)[:, None].astype(
            np.float32
        )


class CategoryCoding(_Frozen):
    """A category as one number for each of `categories`, and one for all others.

    A missing category, and one that is not in the list, is `other`.
    """

    kind: Literal["category"]
    column: str
    categories: Annotated[tuple[str, ...], Field(min_length=1)]

    @property
    def width(self) -> int:
        """How many numbers it gives: one a category, and `other`."""
        return len(self.categories) + 1

    def encode(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return categories [N] as [N, width]: 1 at the category's place, 0 elsewhere."""
        places = {category: place for place, category in enumerate(self.categories)}
        other = len(places)
        coded = np.zeros((len(values), self.width), np.float32)
        coded[np.arange(len(values)), [places.get(each, other) for each in values]] = 1
        return coded


InputCoding = Annotated[NumberCoding | CategoryCoding, Field(discriminator="kind")]


class Coding(_Frozen):
    """The coding of a table's inputs, and of its targets where they are values."""

    inputs: Annotated[tuple[InputCoding, ...], Field(min_length=1)]
    targets: tuple[NumberCoding, ...]
    """Empty where the target is a class."""

    def encode_inputs(self, columns: Columns) -> npt.NDArray[np.float32]:
        """Return the inputs [N, D] of raw columns, in the order of `inputs`."""
        return np.concatenate([each.encode(columns[each.column]) for each in self.inputs], axis=1)

    def encode_targets(self, columns: Columns) -> npt.NDArray[np.float32]:
        """Return the targets [N, outputs] of raw columns, in the order of `targets`."""
        return np.concatenate([each.encode(columns[each.column]) for each in self.targets], axis=1)
