"""Timing several things alternately in every round, so that a busy machine slows all of them.

Rounds, pairs, medians and quartiles; the work timed is in `rows`.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np

Measure = Callable[[], float]
"""Runs something once and returns the milliseconds it took."""

Comparison = Literal["speed", "slowdown", "share"]
"""Of a time and its baseline: baseline / time, time / baseline, and time / baseline as a share."""

TICK = 0.02  # a timing shorter than this, in seconds, is a timing of the scheduler


class Effort(NamedTuple):
    """How long to measure."""

    least: int  # rounds
    most: int  # rounds
    seconds: float  # after which no round is begun, once the least number is done
    quick: bool  # also measure fewer points on smaller work: a smoke test, no figures


FULL = Effort(least=7, most=60, seconds=20, quick=False)
QUICK = Effort(least=2, most=3, seconds=0.3, quick=True)


class Spread(NamedTuple):
    """Quartiles of what the rounds gave."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the quartiles of at least one value."""
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        return cls(float(low), float(median), float(high))


def interleave(
    measures: Mapping[str, Measure], effort: Effort, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Run all measures once in every round; return the milliseconds of each, one a round.

    The order is rotated by one each round, so that none always follows the same other.

    Args:
        measures: what to run, by name.
        effort: when to stop.
        warm_up: run each once before the first round, uncounted.
    """
    if warm_up:
        for measure in measures.values():
            measure()
    names = list(measures)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = perf_counter()
    for done in range(1, effort.most + 1):
        gc.collect()  # so that no measure pays for another's garbage
        for name in names:
            times[name].append(measures[name]())
        names.append(names.pop(0))
        if done >= effort.least and perf_counter() - start >= effort.seconds:
            break
    return times


def stopwatch(run: Callable[[], object]) -> Measure:
    """Return the measure of one call, taken over as many calls as give a time worth reading."""
    calls = 0

    def measure() -> float:
        nonlocal calls
        if not calls:
            run()  # the first may build, load or allocate
            start = perf_counter()
            run()
            calls = max(1, round(TICK / max(perf_counter() - start, 1e-7)))
        start = perf_counter()
        for _ in range(calls):
            run()
        return (perf_counter() - start) / calls * 1e3

    return measure


def paired(
    comparison: Comparison, times: Sequence[float], baseline: Sequence[float]
) -> list[float]:
    """Compare two series round by round: neighbours in time saw the same machine."""
    pairs = list(zip(times, baseline, strict=True))
    return [base / time if comparison == "speed" else time / base for time, base in pairs]
