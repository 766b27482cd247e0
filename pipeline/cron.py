"""Cron expressions as Kubeflow's scheduler reads them: six fields, seconds first, in UTC.

It parses with github.com/robfig/cron 1.2. Only what that reads without surprise is let through;
words and times are CronSim's, given the same expression in a form on which the two agree.
"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice, pairwise

from cronsim import CronSim, CronSimError

from reptile.errors import InputError

_EXAMPLE = "0 0 2 * * * is every night at 02:00"
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
_RANGE = re.compile(r"(?P<first>[*?]|\w+)(-(?P<last>\w+))?(/(?P<step>[0-9]+))?", re.ASCII)
# The scheduler looks no further ahead than this, and runs without end when it finds nothing.
_HORIZON = timedelta(days=5 * 365)


@dataclass(frozen=True)
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()  # of the values from `low` on


_FIELDS = (
    _Field("second", 0, 59),
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, tuple(_MONTHS)),
    _Field("day of week", 0, 6, tuple(_DAYS)),
)


@dataclass(frozen=True)
class Cron:
    """A checked expression: as it was written, and in plain numbers."""

    expression: str
    numbers: str

    @property
    def words(self) -> str:
        """What it means in English, without the time zone."""
        words = CronSim(self.numbers, datetime.min).explain()
        _, _, _, day, _, weekday = self.numbers.split()
        either = not day.startswith("*") and not weekday.startswith("*")
        return f"{words} (a day that fits either is enough)" if either else words

    def times(self, after: datetime, count: int) -> list[datetime]:
        """Return the next `count` times later than `after`, in its time zone.

        Raises:
            InputError: five years pass without a time that fits.
        """
        try:
            times = list(islice(CronSim(self.numbers, after), count))
        except CronSimError:  # no month has so many days
            times = []
        if len(times) < count or any(b - a > _HORIZON for a, b in pairwise([after, *times])):
            raise InputError(
                f"cron {self.expression!r} fits no day for five years, which the scheduler cannot "
                f"handle; change the day or month; {_EXAMPLE}"
            )
        return times


def parse_cron(text: str) -> Cron:
    """Check an expression of six fields: second, minute, hour, day of month, month, day of week.

    Raises:
        InputError: Kubeflow's scheduler would refuse it or read it in an unexpected way.
    """
    parts = text.split()
    if len(parts) == 5:
        # The scheduler takes five too, as second to month: not what anybody means by them.
        raise InputError(
            f"cron {text!r} has five fields; Kubeflow wants the seconds first: "
            f"{' '.join(['0', *parts])!r}"
        )
    if len(parts) != 6:
        raise InputError(
            f"cron {text!r} has {len(parts)} fields; six are needed: second, minute, hour, day of "
            f"month, month, day of week; {_EXAMPLE}"
        )
    numbers = [_numbers(part, field) for part, field in zip(parts, _FIELDS, strict=True)]
    day, weekday = numbers[3], numbers[5]
    if "*" not in (day, weekday) and ("*" in day or "*" in weekday):
        # robfig/cron 1 wants both days to fit then, and its later versions either of them.
        raise InputError(
            f"cron {text!r} narrows both the day of month and the day of week, one with a star and "
            "a step, which is read in two ways; list the days, or leave one of the two at *"
        )
    return Cron(expression=" ".join(parts), numbers=" ".join(numbers))


def _numbers(part: str, field: _Field) -> str:
    """Return a field in numbers alone: `*` if it says nothing, every range with its end."""
    ranges = [_range(text, part, field) for text in part.split(",")]
    return "*" if "*" in ranges else ",".join(ranges)


def _range(text: str, part: str, field: _Field) -> str:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise _unreadable(part, text, field)
    step = int(match["step"]) if match["step"] else 1
    if step == 0:
        raise InputError(f"cron field {field.name} {part!r} has step 0; it must be at least 1")
    if match["first"] in "*?":
        if match["last"]:
            raise _unreadable(part, text, field)
        return "*" if step == 1 else f"*/{step}"
    first = _value(match["first"], part, field)
    if match["last"]:
        last = _value(match["last"], part, field)
    else:  # `3/10` starts at 3 and goes on to the end
        last = field.high if match["step"] else first
    if first > last:
        raise InputError(
            f"cron field {field.name} {part!r} runs backwards from {first} to {last}; "
            f"write two ranges, {first}-{field.high},{field.low}-{last}"
        )
    if first == last:
        return str(first)
    return f"{first}-{last}" if step == 1 else f"{first}-{last}/{step}"


def _value(text: str, part: str, field: _Field) -> int:
    if text.lower() in field.names:
        return field.low + field.names.index(text.lower())
    if not text.isdecimal():
        raise _unreadable(part, text, field)
    value = int(text)
    if not field.low <= value <= field.high:
        hint = "; Sunday is 0" if field.names == tuple(_DAYS) and value == 7 else ""
        raise InputError(
            f"cron field {field.name} {part!r}: {value} is not in {field.low} to {field.high}{hint}"
        )
    return value


def _unreadable(part: str, text: str, field: _Field) -> InputError:
    names = f" or {field.names[0]} to {field.names[-1]}" if field.names else ""
    return InputError(
        f"cron field {field.name} {part!r}: {text!r} is not understood; give {field.low} to "
        f"{field.high}{names}, a range a-b, a step */n, a list a,b, or *"
    )
