"""Cron expressions mean what Kubeflow's scheduler makes of them."""

import random
from datetime import UTC, datetime, timedelta
from itertools import islice, product

import pytest

from pipeline.cron import parse_cron
from reptile.errors import InputError

NOW = datetime(2026, 11, 23, 12, 0, 30, tzinfo=UTC)  # a Monday
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]


def values(field: str, low: int, high: int, names: list[str]) -> set[int]:
    """The values of a field, spelled out from the scheduler's documentation."""
    found: set[int] = set()
    for part in field.lower().split(","):
        body, _, step = part.partition("/")
        first, _, last = body.partition("-")
        number = {name: index + low for index, name in enumerate(names)}
        if first in "*?":
            start, end = low, high
        else:
            start = number[first] if first in number else int(first)
            end = number[last] if last in number else int(last) if last else start
            if step and not last:
                end = high
        found |= set(range(start, end + 1, int(step or 1)))
    return found


def times_by_hand(expression: str, after: datetime, count: int) -> list[datetime]:
    """The next times, found by looking at every day, and within a day at every fitting second."""
    second, minute, hour, day, month, weekday = expression.split()
    seconds, minutes = values(second, 0, 59, []), values(minute, 0, 59, [])
    hours, months = values(hour, 0, 23, []), values(month, 1, 12, MONTHS)
    days, weekdays = values(day, 1, 31, []), values(weekday, 0, 6, DAYS)
    star = any(part[0] in "*?" for field in (day, weekday) for part in field.split(","))
    found: list[datetime] = []
    date = after.replace(hour=0, minute=0, second=0)
    while len(found) < count:
        fits = [date.day in days, date.isoweekday() % 7 in weekdays]
        if date.month in months and (all(fits) if star else any(fits)):
            of_the_day = (
                date.replace(hour=h, minute=m, second=s)
                for h, m, s in product(sorted(hours), sorted(minutes), sorted(seconds))
            )
            found += islice((time for time in of_the_day if time > after), count)
        date += timedelta(days=1)
    return found[:count]


def drawn(rng: random.Random, low: int, high: int, names: list[str]) -> str:
    def value() -> str:
        number = rng.randint(low, high)
        return rng.choice([names[number - low].upper(), str(number)]) if names else str(number)

    part = rng.choice(["*", "?", value(), value(), f"{low}-{value()}", f"{value()}-{high}"])
    if rng.random() < 0.3:
        part += f"/{rng.randint(1, 9)}"
    return part


def test_the_next_times_are_those_found_by_looking_at_every_day() -> None:
    rng = random.Random(0)
    bounds = [(0, 59, []), (0, 59, []), (0, 23, []), (1, 28, []), (1, 12, MONTHS), (0, 6, DAYS)]
    agreed = 0
    for _ in range(200):
        expression = " ".join(
            "*"
            if rng.random() < 0.3
            else ",".join(drawn(rng, *b) for _ in range(rng.choice([1, 2])))
            for b in bounds
        )
        try:
            cron = parse_cron(expression)
        except InputError as error:
            assert "read in two ways" in str(error), expression
            continue
        assert cron.times(NOW, 3) == times_by_hand(expression, NOW, 3), expression
        agreed += 1
    assert agreed > 150


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("0 0 2 * * *", "At 02:00 every day"),
        ("0 0 2 ? * MON-fri", "At 02:00 on Monday through Friday"),
        ("0 0 2 1 * ?", "At 02:00 on the first day of every month"),
        ("0 0 2 1 * 1", "(a day that fits either is enough)"),
        ("30 */15 * * * *", "every 15th minute"),
    ],
)
def test_an_expression_is_explained_in_words(expression: str, words: str) -> None:
    assert words in parse_cron(expression).words


@pytest.mark.parametrize(
    ("expression", "way_out"),
    [
        ("0 2 * * *", "'0 0 2 * * *'"),  # of five fields: what six would mean the same
        ("0 0 2 * *  * 2027", "six are needed"),
        ("@daily", "six are needed"),
        ("", "six are needed"),
        ("0 0 2 L * *", "give 1 to 31"),
        ("0 0 2 * * MON#1", "or sun to sat"),
        ("0 0 2 * * Monday", "or sun to sat"),
        ("0 0 2 * * 7", "Sunday is 0"),
        ("60 0 2 * * *", "not in 0 to 59"),
        ("0 0 24 * * *", "not in 0 to 23"),
        ("0 0 2 0 * *", "not in 1 to 31"),
        ("0 0 22-2 * * *", "22-23,0-2"),
        ("0 */0 2 * * *", "at least 1"),
        ("0 0 2 *-5 * *", "not understood"),
        ("0 0 2 -5 * *", "not understood"),
        ("0 0 2 1,,5 * *", "not understood"),
        ("0 0 2 \u0662 * *", "not understood"),  # a digit, but not one of ASCII
        ("0 0 2 */2 * MON", "leave one of the two at *"),
    ],
)
def test_what_the_scheduler_would_refuse_or_misread_is_refused(
    expression: str, way_out: str
) -> None:
    with pytest.raises(InputError) as error:
        parse_cron(expression)
    assert way_out in str(error.value)


@pytest.mark.parametrize("expression", ["0 0 0 30 2 *", "0 0 0 31 4,6,9,11 *", "0 0 0 29 2 ?,*/7"])
def test_a_day_that_never_comes_is_refused(expression: str) -> None:
    """The scheduler would find the year 1, which has passed, and start runs without end."""
    cron = parse_cron(expression)
    if "29" in expression:  # every leap day, which is rare but fine
        assert [t.year for t in cron.times(NOW, 2)] == [2028, 2032]
    else:
        with pytest.raises(InputError, match="five years"):
            cron.times(NOW, 1)
