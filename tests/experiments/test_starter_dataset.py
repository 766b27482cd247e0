"""The study of the starter dataset runs, and reports both training sets beside each other."""

import subprocess
import sys
from pathlib import Path

import pytest
from patterns import draw_letters


@pytest.mark.slow
def test_the_study_compares_both_training_sets_at_one_and_five_shots(
    root: Path, tmp_path: Path
) -> None:
    draw_letters(tmp_path / "letters", images=20)
    command = [sys.executable, "-m", "experiments.starter_dataset", str(tmp_path / "letters")]
    done = subprocess.run(
        [*command, "--iterations", "2", "--tasks", "4"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "±" in line]
    assert [(row[1], row[3]) for row in rows] == [
        ("glyphs", "1"),
        ("glyphs", "5"),
        ("letters", "1"),
        ("letters", "5"),
    ]
    assert all(row.count("±") == 3 for row in rows)
