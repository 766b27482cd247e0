"""The study of tables: its classical rows, and that it runs on made tables of the same columns."""

import json
from pathlib import Path

import numpy as np
import pytest
from studies import run_study

from experiments import tables
from experiments.tables import LEARNERS, ROWS, mixed_effects
from reptile.errors import InputError


def made(folder: Path) -> None:
    """Growth over time: BodyWeight with a diet, sleepstudy without other columns."""
    rng = np.random.default_rng(0)
    for name, header in (
        ("BodyWeight", "weight,Time,Rat,Diet"),
        ("sleepstudy", "Reaction,Days,Subject"),
    ):
        lines = [header]
        for subject in range(12):
            slope, start = rng.normal(3, 1), rng.normal(20, 5)
            for day in range(7):
                value = start + slope * day + rng.normal(0, 0.5)
                diet = f",{1 + subject % 3}" if "Diet" in header else ""
                lines.append(f"{value:.3f},{day},{subject}{diet}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


def test_the_study_runs_and_again_from_what_it_has_measured(tmp_path: Path) -> None:
    made(tmp_path)
    words = ["BodyWeight", "sleepstudy", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    words += ["--folds", "2", "--partitions", "2", "--inner", "2", "--iterations", "2"]
    words += ["--tasks", "40"]
    results = []
    for _ in range(2):
        printed = run_study(tables.main, words)
        results.append(json.loads((tmp_path / "out/tables.json").read_text()))
    assert results[0] == results[1]
    growth, sleep = results[0]["BodyWeight, random"], results[0]["sleepstudy, past"]
    assert growth["subjects"] == 12 and growth["errors"].keys() == ROWS.keys()
    assert ROWS.keys() - sleep["errors"].keys() == {"columns"}
    assert set(growth["chosen"]) <= LEARNERS.keys()
    assert growth["errors"]["mixed"] < growth["errors"]["zero"]
    assert set(growth["chosen"]) != {"fitted"} or abs(growth["ratio"][0]) < 0.05
    assert "| BodyWeight, random | 12 |" in printed


def test_the_mixed_effects_model_finds_what_the_subjects_were_made_with() -> None:
    rng = np.random.default_rng(1)
    subjects = []
    for _ in range(300):
        x = np.c_[np.ones(8), rng.uniform(-1, 1, 8)]
        weights = [1, -2] + rng.normal(size=2) * [1.0, 0.5]
        subjects.append((x, x @ weights + rng.normal(0, 0.2, 8)))
    mean, covariance, noise = mixed_effects(subjects, 300)
    np.testing.assert_allclose(mean, [1, -2], atol=0.15)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), [1, 0.5], rtol=0.15)
    assert np.sqrt(noise) == pytest.approx(0.2, rel=0.05)


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no table 'Titanic'; there are ChickWeight"):
        tables.main(["Titanic"], output=tmp_path)
