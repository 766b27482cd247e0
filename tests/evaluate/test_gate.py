"""The gate: what passes, what does not, and what cannot be judged."""

import json
import math

import pytest

from reptile.errors import GateError, InputError
from reptile.evaluate.gate import check_gate, read_champion, refusal
from reptile.evaluate.metrics import Choice, Metrics, Mode, Score, upgrade
from reptile.settings import GateSettings

FLOOR = GateSettings(shots=1, mode="frozen", accuracy=0.6, above_random=0.2)


def scores(accuracy: float, interval: float = 0.02, random: float = 0.3) -> Metrics:
    methods: dict[str, dict[Mode, Score]] = {
        "trained": {"frozen": Score(accuracy, interval)},
        "random": {"frozen": Score(random, 0.02)},
    }
    return Metrics(
        objective="classification",
        metric="accuracy",
        ways=5,
        held_out="letters",
        scores={"letters": {1: methods}},
    )


@pytest.mark.parametrize(("accuracy", "random"), [(0.6, 0.3), (0.5 + 0.25, 0.5), (1.0, 0.79)])
def test_at_both_floors_or_above_passes(accuracy: float, random: float) -> None:
    assert refusal(FLOOR, scores(accuracy, random=random)) is None
    check_gate(FLOOR, scores(accuracy, random=random))


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
    reason = refusal(FLOOR, scores(accuracy, random=random))
    assert reason
    assert words in reason
    with pytest.raises(GateError, match=r"export\.gate"):
        check_gate(FLOOR, scores(accuracy, random=random))


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
    champion: Metrics, passes: bool
) -> None:
    reason = refusal(FLOOR, scores(0.70, 0.02), champion)
    assert (reason is None) == passes
    assert passes or "champion" in str(reason)


def two_learners(trained: float, beside: float, best: str) -> Metrics:
    """Metrics of a learner and one beside, of which validation tasks choose one."""
    methods = scores(trained).scores["letters"][1] | {
        "ridge-trained": {"none": Score(beside, 0.02)}
    }
    names = ("trained", "ridge-trained")
    return Metrics(
        **scores(trained).model_dump(exclude={"scores", "beside", "chosen"}),
        scores={"letters": {1: methods}},
        beside=("ridge-trained",),
        chosen=Choice(
            best=best,
            tasks=50,
            ways=5,
            scores={name: Score(0.9 if name == best else 0.8, 0.02) for name in names},
            differences={},
        ),
    )


@pytest.mark.parametrize(
    ("champion", "words"),
    [
        (0.94, None),  # itself
        (0.99, "second learner, trained through ridge regression (ridge-trained) is 0.9400"),
    ],
)
def test_the_learner_that_would_be_exported_is_held_to_the_champion(
    champion: float, words: str | None
) -> None:
    there = two_learners(0.7, champion, "ridge-trained").model_copy(
        update={"learner": "ridge-trained"}  # as in a bundle
    )
    reason = refusal(FLOOR, two_learners(0.7, 0.94, "ridge-trained"), there)
    assert reason is None if words is None else words in str(reason)
    not_chosen = refusal(FLOOR, two_learners(0.7, 0.94, "trained"), there)
    assert "is 0.7000" in str(not_chosen), "the score of what would be exported"


def test_beating_the_champion_is_not_enough_below_the_floor() -> None:
    assert "gate of 0.6" in str(refusal(FLOOR, scores(0.5), scores(0.1)))


def test_an_interval_that_is_not_a_number_loses_to_any_champion() -> None:
    assert refusal(FLOOR, scores(0.9, math.nan), scores(0.1)) is not None


def compared(
    differences: dict[str, tuple[float, float]],
    *,
    objective: str = "classification",
    beside: tuple[str, ...] = (),
    learner: str = "trained",
) -> Metrics:
    """Metrics of a learner with these differences of other methods to it."""
    accuracy = objective == "classification"
    values = {
        "objective": objective,
        "metric": "accuracy" if accuracy else "mean_squared_error",
        "ways": 5,
        "held_out": "letters",
        "learner": learner,
        "beside": beside,
        "scores": {
            "letters": {
                1: {
                    learner: {"frozen": {"mean": 0.7, "interval": 0.02}},
                    "random": {"frozen": {"mean": 0.3 if accuracy else 2.0, "interval": 0.02}},
                }
            }
        },
        "differences": {
            "letters": {
                1: {
                    name: {"frozen": {"mean": mean, "interval": interval}}
                    for name, (mean, interval) in differences.items()
                }
            }
        },
    }
    return Metrics.model_validate(values)


@pytest.mark.parametrize(
    ("difference", "passes"),
    [((0.03, 0.02), False), ((0.02, 0.02), True), ((0.01, 0.02), True), ((-0.3, 0.01), True)],
)
def test_only_a_method_better_beyond_its_paired_interval_refuses(
    difference: tuple[float, float], passes: bool
) -> None:
    reason = refusal(FLOOR, compared({"linear_probe": difference}))
    assert (reason is None) == passes


def test_the_refusal_names_the_method_that_beats_by_most_and_the_ways_out() -> None:
    beaten = compared({"ridge": (0.05, 0.01), "nearest_mean": (0.02, 0.01)})
    with pytest.raises(
        GateError, match=r"ridge regression \(ridge\), by 0\.0500 ± 0\.0100"
    ) as caught:
        check_gate(FLOOR, beaten)
    assert "evaluate.learner: ridge" in str(caught.value)
    assert "export.gate.insist" in str(caught.value)
    check_gate(FLOOR.model_copy(update={"insist": True}), beaten)


def test_of_a_regressor_a_smaller_error_beats() -> None:
    limits = GateSettings(shots=1, mode="frozen", above_random=0.2)
    assert refusal(limits, compared({"zero": (0.5, 0.1)}, objective="regression")) is None
    assert "zero" in str(refusal(limits, compared({"zero": (-0.5, 0.1)}, objective="regression")))


def test_another_network_beside_is_no_reason_to_refuse() -> None:
    assert refusal(FLOOR, compared({"second": (0.2, 0.01)}, beside=("second",))) is None
    assert refusal(FLOOR, compared({"second": (0.2, 0.01)})) is not None


def test_what_is_gated_is_the_learner_that_the_bundle_is_to_have() -> None:
    assert refusal(FLOOR, compared({"trained": (-0.1, 0.01)}, learner="ridge")) is None
    assert "trained learner" in str(
        refusal(FLOOR, compared({"trained": (0.1, 0.01)}, learner="ridge"))
    )


def without(metrics: Metrics, missing: str) -> Metrics:
    """The metrics with this dataset, number of shots, method or mode under another name."""
    other = {"letters": "digits", "1": "2", "trained": "joint", "random": "zero"}
    text = metrics.model_dump_json(include={"scores"})
    spoilt = text.replace(f'"{missing}"', f'"{other.get(missing, "transductive")}"')
    return metrics.model_copy(
        update={
            "scores": Metrics.model_validate(
                metrics.model_dump(mode="json") | json.loads(spoilt)
            ).scores
        }
    )


@pytest.mark.parametrize("missing", ["letters", "1", "frozen", "trained", "random"])
def test_a_score_that_was_not_measured_is_an_error_not_a_verdict(missing: str) -> None:
    with pytest.raises(InputError, match="1-shot frozen on letters, which was not evaluated"):
        refusal(FLOOR, without(scores(0.9), missing))


@pytest.mark.parametrize("missing", ["letters", "1", "frozen", "trained"])
def test_a_champion_measured_otherwise_is_an_error_not_a_verdict(missing: str) -> None:
    with pytest.raises(InputError, match="not measured for the champion"):
        refusal(FLOOR, scores(0.9), without(scores(0.9), missing))


def test_a_champion_of_format_1_is_compared_by_the_same_scores() -> None:
    numbers = {
        "accuracy": 0.74,
        "interval": 0.02,
        "random_accuracy": 0.3,
        "random_interval": 0.01,
    }
    nearest = {"accuracy": 0.5, "interval": 0.03}
    old = {
        "format": 1,
        "name": "old",
        "task": {"ways": 5},
        "provenance": {"dataset": "letters", "data_sha256": "d", "splits_sha256": "s"},
        "metrics": {"letters": {"1-shot": {"frozen": numbers, "nearest_mean": nearest}}},
    }
    metrics = read_champion(json.dumps(old)).metrics
    assert metrics.ways == 5
    assert metrics.score("letters", 1, "trained", "frozen") == Score(0.74, 0.02)
    assert metrics.score("letters", 1, "random", "frozen") == Score(0.3, 0.01)
    assert metrics.score("letters", 1, "nearest_mean", "transductive") == Score(0.5, 0.03)
    assert refusal(FLOOR, scores(0.70, 0.02), metrics) is None
    assert "champion" in str(refusal(FLOOR, scores(0.69, 0.02), metrics))


def test_a_regressor_of_format_1_keeps_its_errors() -> None:
    numbers = {
        "mean_squared_error": 0.4,
        "interval": 0.1,
        "random_mean_squared_error": 4.0,
        "random_interval": 0.2,
        "joint_mean_squared_error": 2.0,
        "joint_interval": 0.3,
    }
    zero = {"mean_squared_error": 3.0, "interval": 0.5}
    metrics = upgrade({"sinusoid": {"10-shot": {"frozen": numbers, "zero": zero}}}, 1, "sinusoid")
    assert metrics.metric == "mean_squared_error"
    assert metrics.score("sinusoid", 10, "joint", "frozen") == Score(2.0, 0.3)
    assert metrics.methods == ("trained", "joint", "random", "zero")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": "x", "provenance": 3}', "null"])
def test_a_champion_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"manifest\.json"):
        read_champion(text)
