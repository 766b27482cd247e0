"""The study of signals: its simple rows, that it runs on made recordings, and its page."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import run_study
from typer.testing import CliRunner

from experiments import signals
from experiments.signals import ROWS, hand_made, read_ts, resample, warped_distance
from reptile import cli
from reptile.errors import InputError

PAGE = Path(__file__).parents[2] / "docs/signals.md"
STAGES = ("prepare", "train", "evaluate", "export", "verify")


def made(folder: Path, name: str, persons: int, recordings: int) -> None:
    """Recordings of different lengths, in two files: each person has a frequency."""
    (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in ("TRAIN", "TEST"):
        lines = ["# made", "@data"]
        for person, _ in itertools.product(range(persons), range(recordings)):
            times = np.arange(rng.integers(30, 50))
            series = np.sin(times * (person + 1) / 10 + rng.uniform(0, 6))
            lines.append(",".join(f"{value:.4f}" for value in series) + f":{person + 1}")
        (folder / name / f"{name}_{part}.ts").write_text("\n".join(lines) + "\n")


def test_the_study_runs_and_again_from_what_it_has_measured(tmp_path: Path) -> None:
    made(tmp_path, "PickupGestureWiimoteZ", 10, 5)
    words = ["PickupGestureWiimoteZ", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    words += ["--splits", "1", "--iterations", "1", "--tasks", "2"]
    printed = [run_study(signals.main, words) for _ in range(2)]
    assert printed[0] == printed[1]
    rows = [line.split("|")[1].strip() for line in printed[0].splitlines()[2:]]
    assert rows == list(ROWS.values())


@pytest.mark.slow
def test_the_page_goes_from_a_file_to_a_consumer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings, commands and program, on made recordings and with a short training."""
    made(tmp_path / "data", "JapaneseVowels", 9, 10)
    study = next(each for each in signals.STUDIES if each.name == "JapaneseVowels")
    signals.make_arrays(study, tmp_path / "data", tmp_path / "artifacts/signals")
    page = PAGE.read_text(encoding="utf-8")
    (settings,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "vowels.yaml").write_text(settings)
    few = ["train.meta_iterations=5", "evaluate.tasks=4", "verify.tasks=20"]
    monkeypatch.chdir(tmp_path)
    for stage in STAGES:
        command = f"{stage} --params vowels.yaml --artifacts runs/vowels"
        assert f"reptile {command}\n" in page
        words = [*command.split(), *itertools.chain(*(("-S", each) for each in few))]
        done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    found: dict[str, Any] = {}
    exec(program, found)
    assert len(found["names"]) == 3 * (20 - 5) and 0 <= found["right"] <= 1


def test_a_file_of_the_archive_is_read_and_resampled(tmp_path: Path) -> None:
    (tmp_path / "a.ts").write_text("# words: of 1,2\n@data\n1,2,3:4,5,6:b\n7,9:7,8:a\n\n")
    (first, b), (second, a) = read_ts(tmp_path / "a.ts")
    assert (a, b) == ("a", "b")
    np.testing.assert_array_equal(first, [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_allclose(resample(second, 3), np.array([[7, 8, 9], [7, 7.5, 8], [0.02] * 3]))


def test_hand_made_features_of_a_wave_are_its_mean_deviation_and_band() -> None:
    times = np.arange(64) / 64
    slow, fast = (3 + np.sin(2 * np.pi * cycles * times) for cycles in (1, 20))
    found = hand_made(np.array([[slow], [fast]]))
    np.testing.assert_allclose(found[:, 0], 3)
    np.testing.assert_allclose(found[:, 1], np.sqrt(0.5))
    assert found[0, 2] < found[1, 2]
    assert found[:, 3:].argmax(1).tolist() == [0, 3]


def test_time_warping_is_the_cheapest_of_all_alignments() -> None:
    """By the definition, over all monotone paths."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 2, 4))

    def cheapest(x: np.ndarray, y: np.ndarray, i: int, j: int) -> float:
        cost = float(((x[:, i] - y[:, j]) ** 2).sum())
        before = [(i - 1, j), (i, j - 1), (i - 1, j - 1)]
        rest = [cheapest(x, y, *each) for each in before if min(each) >= 0]
        return cost + (min(rest) if rest else 0)

    expected = [cheapest(x, y, 3, 3) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(warped_distance(a, b), expected)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no set 'Gestures'; there are PickupGestureWiimoteZ"):
        signals.main(["Gestures"], output=tmp_path)
    with pytest.raises(InputError, match=r"Vowels_TRAIN.ts: no such file; name aeon's folder"):
        signals.main(["JapaneseVowels"], data=tmp_path, output=tmp_path)
