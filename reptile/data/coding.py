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
        with np.errstate(over="ignore"):  # the caller refuses what is infinite
            scaled = (np.asarray(values, np.float64) - self.mean) / self.deviation
            return np.nan_to_num(scaled, nan=0.0, posinf=np.inf, neginf=-np.inf)[:, None].astype(
                np.float32
            )

    def decode(self, coded: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return coded numbers [N, 1] as values [N]."""
        return np.asarray(coded[:, 0], np.float64) * self.deviation + self.mean


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

    def decode(self, coded: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return coded categories [N, width] as places [N] in the list; `other` is the last."""
        return np.asarray(coded.argmax(axis=1), np.float64)


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

    def rows(self, coded: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return coded inputs [N, D] as the rows [N, columns] that a bundle takes.

        A number that is coded as 0 becomes NaN, which is coded so too: a missing one cannot be told
        from the mean. A category becomes its place in the list; see `export.coding`.
        """
        ends = np.cumsum([each.width for each in self.inputs])
        parts = np.split(coded, ends[:-1], axis=1)
        rows = [
            np.where(part[:, 0] == 0, np.nan, each.decode(part))
            if isinstance(each, NumberCoding)
            else each.decode(part)
            for each, part in zip(self.inputs, parts, strict=True)
        ]
        return np.stack(rows, axis=1)

    def encode_rows(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the inputs [N, D] of rows [N, columns] as `rows` returns them."""
        columns = {
            each.column: values
            if isinstance(each, NumberCoding)
            else np.array([dict(enumerate(each.categories)).get(place) for place in values])
            for each, values in zip(self.inputs, rows.T, strict=True)
        }
        return self.encode_inputs(columns)

    def decode_targets(self, coded: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return coded targets [N, outputs] in the units of their columns."""
        return np.asarray(coded, np.float64) * self.deviations + [t.mean for t in self.targets]

    def blank(self) -> npt.NDArray[np.float32]:
        """Return two coded rows [2, D] without any value: the means, and `other` categories."""
        missing = {
            each.column: np.full(2, np.nan if isinstance(each, NumberCoding) else None)
            for each in self.inputs
        }
        return self.encode_inputs(missing)

    @property
    def deviations(self) -> npt.NDArray[np.float64]:
        """By what each target is divided, [outputs]: a coded variance times its square is raw."""
        return np.array([target.deviation for target in self.targets])
