"""The gate: what passes, what does not, and what cannot be judged."""

import json
import math
from typing import Any

import pytest

from reptile.errors import GateError, InputError
from reptile.evaluate.gate import check_gate, read_champion, refusal
from reptile.settings import GateSettings

FLOOR = GateSettings(shots=1, mode="frozen", accuracy=0.6, above_random=0.2)


def scores(accuracy: float, interval: float = 0.02, random: float = 0.3) -> dict[str, Any]:
    frozen = {"accuracy": accuracy, "interval": interval, "random_accuracy": random}
    return {"letters": {"1-shot": {"frozen": frozen}}}


@pytest.mark.parametrize(("accuracy", "random"), [(0.6, 0.3), (0.5 + 0.25, 0.5), (1.0, 0.79)])
def test_at_both_floors_or_above_passes(accuracy: float, random: float) -> None:
    assert refusal(FLOOR, "letters", scores(accuracy, random=random)) is None
    check_gate(FLOOR, "letters", scores(accuracy, random=random))


@pytest.mark.parametrize(
    ("accuracy", "random", "words"),
    [
        (0.59, 0.3, "below the gate of 0.6"),
        (0.7, 0.6, "above the random"),
        (math.nan, 0.3, "nan"),
        (0.7, math.nan, "nan"),
        (-math.inf, 0.3, "below"),
    ],
)
def test_below_a_floor_or_not_a_number_is_refused(
    accuracy: float, random: float, words: str
) -> None:
    reason = refusal(FLOOR, "letters", scores(accuracy, random=random))
    assert reason
    assert words in reason
    with pytest.raises(GateError, match=r"export\.gate"):
        check_gate(FLOOR, "letters", scores(accuracy, random=random))


@pytest.mark.parametrize(
    ("champion", "passes"),
    [
        (scores(0.70), True),
        (scores(0.74, 0.02), True),  # 0.70 + 0.02 meets 0.74 - 0.02
        (scores(0.7401, 0.02), False),
        (scores(0.7401, 0.03), True),  # a champion known less well
        (scores(0.99), False),
        (scores(0.10), True),
        (scores(math.nan), False),
        (scores(0.70, math.nan), False),
    ],
)
def test_only_an_interval_wholly_below_the_champions_is_worse(
    champion: dict[str, Any], passes: bool
) -> None:
    reason = refusal(FLOOR, "letters", scores(0.70, 0.02), champion)
    assert (reason is None) == passes
    assert passes or "champion" in str(reason)


def test_beating_the_champion_is_not_enough_below_the_floor() -> None:
    assert "gate of 0.6" in str(refusal(FLOOR, "letters", scores(0.5), scores(0.1)))


def test_an_interval_that_is_not_a_number_loses_to_any_champion() -> None:
    assert refusal(FLOOR, "letters", scores(0.9, math.nan), scores(0.1)) is not None


@pytest.mark.parametrize("missing", ["letters", "1-shot", "frozen", "accuracy", "interval"])
@pytest.mark.parametrize("whose", ["challenger", "champion"])
def test_a_missing_metric_is_an_error_not_a_verdict(missing: str, whose: str) -> None:
    spoilt = json.loads(json.dumps(scores(0.9)).replace(f'"{missing}"', '"other"'))
    metrics = (spoilt, None) if whose == "challenger" else (scores(0.9), spoilt)
    with pytest.raises(InputError, match="1-shot frozen on letters") as error:
        refusal(FLOOR, "letters", *metrics)
    assert (whose == "champion") == ("champion" in str(error.value))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": "x", "provenance": 3}', "null"])
def test_a_champion_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"manifest\.json"):
        read_champion(text)
