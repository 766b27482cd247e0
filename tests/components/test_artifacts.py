"""What Kubeflow is told of a stage, where running the pipeline does not show it."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from components.artifacts import confusion_matrix, finite, measure, prepare
from reptile.errors import InputError


class Folder:
    """An artifact as KFP has it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.metadata: dict[str, object] = {}


def test_scores_that_are_not_finite_are_named_but_not_kept() -> None:
    kept = finite({"a": 1.0, "b": math.nan, "c": -math.inf, "d": "text", "e": 3})
    assert kept == {"a": 1.0, "d": "text", "e": 3, "not_finite": "b, c"}
    assert finite({"a": 0.0}) == {"a": 0.0}


def test_a_confusion_matrix_counts_every_query(tmp_path: Path) -> None:
    pairs = [("b", "a"), ("b", "b"), ("a", "c"), ("b", "a")]
    path = tmp_path / "confusion.csv"
    path.write_text("actual,predicted\n" + "".join(f"{a},{p}\n" for a, p in pairs))
    names, matrix = confusion_matrix(path)
    assert names == ["a", "b", "c"]
    cells = [(a, p) for a in names for p in names]
    counted = Counter(dict(zip(cells, np.ravel(matrix).tolist(), strict=True)))
    assert +counted == Counter(pairs)


@pytest.mark.parametrize(
    "point", ["", "5-way", "5-way 1-shot", "5.0-way 1-shot frozen", "5-way 0-shot frozen", "frozen"]
)
def test_a_point_that_cannot_be_read_is_an_error(point: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5-way 1-shot frozen"):
        measure("{}", point, Folder(tmp_path), Folder(tmp_path))


def test_settings_that_are_wrong_stop_before_anything_is_fetched(tmp_path: Path) -> None:
    for settings in ("", "{", '{"image_size": 0}', '{"size": 28}'):
        with pytest.raises(InputError, match="PrepareSettings"):
            prepare(settings, "nowhere", "", "data", "", "", Folder(tmp_path / "prepared"))
