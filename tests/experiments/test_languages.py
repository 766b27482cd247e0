"""The study of names in many languages: its simple rows, and that it runs on made embeddings."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from sklearn.linear_model import Ridge
from typer.testing import CliRunner

from experiments import languages
from experiments.languages import FEWEST, LANGUAGES, PAIRS, ROWS, WAYS, Residual, read_names
from reptile.errors import InputError


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


def test_the_study_runs_and_again_from_what_it_has_measured(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    subgroups = np.repeat([f"group {n:02}" for n in range(32)], FEWEST)
    centres = rng.normal(size=(32, 16)).repeat(FEWEST, 0)
    inputs = centres + 0.5 * rng.normal(size=(len(LANGUAGES), len(centres), 16))
    out = tmp_path / "out"
    out.mkdir()
    np.savez(out / "names.npz", inputs=inputs.astype(np.float32), subgroups=subgroups)
    words = ["emojis.tgz", "--output", str(out), "--folds", "5"]
    words += ["--iterations", "1", "--tasks", "2"]
    app = typer.Typer()
    app.command()(languages.main)
    printed = []
    for _ in range(2):
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        printed.append(done.output)
    assert printed[0] == printed[1]
    rows = [line.split("|")[1:-1] for line in printed[0].splitlines() if line]
    assert [row[0].strip() for row in rows].count(ROWS["reptile"]) == len(languages.SHOTS)
    assert all(len(row) == 1 + len(PAIRS) for row in rows)


def test_ridge_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    support, query = rng.normal(size=(15, 40)), rng.normal(size=(6, 40))
    labels = np.repeat(range(WAYS), 3)
    model = Ridge(alpha=0.7).fit(support, np.eye(WAYS)[labels])
    found = languages.ridge(0.7)(support, labels)(query)
    np.testing.assert_array_equal(found, model.predict(query).argmax(1))


def test_the_network_begins_as_the_encoder() -> None:
    network = Residual(8, 3)
    inputs = torch.randn(5, 8)
    torch.testing.assert_close(network(inputs), network.head(inputs))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.tgz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"other.tgz: no package emojibase-data"):
        read_names(tmp_path / "other.tgz")
    with pytest.raises(InputError, match=r"none.tgz: no package emojibase-data"):
        read_names(tmp_path / "none.tgz")
