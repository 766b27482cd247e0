"""Results, as written to JSON and read again; every figure is computed from the rounds."""

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from benchmarks.machine import Machine
from benchmarks.timing import Comparison, Spread, paired
from reptile.errors import InputError
from reptile.files import write_json
from reptile.settings import describe

OTHERS = 0.05  # share of the CPUs' time given to other programs above which figures are spoiled
WIDTH = 0.25  # distance of a ratio's quartiles above which it is no figure, see `Line.unsure`
LOAD = 0.5  # load average for each CPU before the run above which the machine was not quiet


class Point(BaseModel):
    """A place on a curve."""

    model_config = ConfigDict(frozen=True)

    curve: str
    x: float


class Compared(BaseModel):
    """A measurement and its baseline, if it has one."""

    model_config = ConfigDict(frozen=True)

    label: str
    ratios: tuple[float, ...] = ()  # to the baseline, one a round; empty for a baseline
    limit: float | None = None

    @computed_field
    @property
    def ratio(self) -> Spread | None:
        """Quartiles of the rounds' ratios, not the ratio of the medians."""
        return Spread.of(self.ratios) if self.ratios else None

    def keeps_limit(self, at_least: bool) -> bool | None:
        """Whether the median ratio is at least the limit, or at most; None without either."""
        if self.limit is None or self.ratio is None:
            return None
        keeps = operator.ge if at_least else operator.le
        return bool(keeps(self.ratio.median, self.limit))


class Line(Compared):
    """One thing that was timed."""

    milliseconds: tuple[float, ...]  # one a round
    comparison: Comparison = "speed"
    tasks: int | None = None  # adapted to in one timing
    point: Point | None = None

    @computed_field
    @property
    def time(self) -> Spread:
        """Quartiles of the milliseconds."""
        return Spread.of(self.milliseconds)

    @computed_field
    @property
    def tasks_per_second(self) -> float | None:
        """How many tasks are adapted to in a second, by the median."""
        return self.tasks / self.time.median * 1e3 if self.tasks else None

    @property
    def unsure(self) -> float:
        """How far the ratio's quartiles lie apart: relative to it, a share's in shares."""
        if self.ratio is None:
            return 0.0
        low, median, high = self.ratio
        return (high - low) / (1.0 if self.comparison == "share" else median)

    @computed_field
    @property
    def within_limit(self) -> bool | None:
        """Whether the median ratio keeps its limit: the least speed, the most slowdown or share."""
        return self.keeps_limit(at_least=self.comparison == "speed")


class Row(BaseModel):
    """Lines that were measured in the same rounds."""

    model_config = ConfigDict(frozen=True)

    name: str
    title: str
    lines: tuple[Line, ...]
    others: float | None = None  # share of the CPUs' time that went to other programs meanwhile
    seconds: float = 0.0

    @computed_field
    @property
    def disturbed(self) -> bool:
        """Whether the figures are unreliable."""
        return (self.others or 0.0) > OTHERS or self.widest > WIDTH

    @property
    def widest(self) -> float:
        """The least sure ratio's quartiles' distance."""
        return max(line.unsure for line in self.lines)


class Results(BaseModel):
    """A whole run."""

    model_config = ConfigDict(frozen=True)

    machine: Machine
    engine: str  # what `engine: auto` selected
    started: str
    seconds: float
    quick: bool
    rows: tuple[Row, ...]

    @computed_field
    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons why these figures are unreliable."""
        problems = []
        if self.quick:
            problems.append("a quick run: few rounds on small work, no usable figures")
        load, cpus = self.machine.load_average[0], self.machine.cpus
        if load > LOAD * cpus:
            problems.append(f"the load average was {load:.1f} on {cpus} CPUs before the run")
        busy = [f"{row.name} {row.others:.0%}" for row in self.rows if (row.others or 0) > OTHERS]
        if busy:
            problems.append(f"other programs took part of the CPUs: {', '.join(busy)}")
        wide = [f"{row.name} {row.widest:.0%}" for row in self.rows if row.widest > WIDTH]
        if wide:
            problems.append(f"a ratio's quartiles lie far apart: {', '.join(wide)}")
        return tuple(problems)


def compared(
    times: Mapping[str, Sequence[float]],
    baseline: str,
    *,
    comparison: Comparison = "speed",
    limits: Mapping[str, float] | None = None,
    tasks: int | None = None,
) -> tuple[Line, ...]:
    """Make the lines of one row in which everything is compared with one baseline."""
    return tuple(
        Line(
            label=label,
            milliseconds=tuple(series),
            comparison=comparison,
            ratios=tuple(() if label == baseline else paired(comparison, series, times[baseline])),
            limit=(limits or {}).get(label),
            tasks=tasks,
        )
        for label, series in times.items()
    )


def write_results(path: Path, results: Results) -> None:
    """Write a run as JSON, with every round and the figures that follow from them."""
    write_json(path, results.model_dump(mode="json"))


def read_results(path: Path) -> Results:
    """Read a run that `write_results` wrote.

    Raises:
        InputError: no such file, or not such a file.
    """
    try:
        return Results.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; measure first") from None
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error)[0]}; measure again") from None
