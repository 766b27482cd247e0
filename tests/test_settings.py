from pathlib import Path

import pytest

from reptile.errors import InputError
from reptile.settings import Settings, load_settings


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return path


def test_the_projects_params_are_valid_and_complete(root: Path) -> None:
    settings = load_settings(root / "params.yaml")
    assert settings.train.meta_batch == 5
    given = load_settings(root / "params.yaml").model_dump(exclude_unset=True)
    left_out = Settings().prepare.model_dump().keys() - given["prepare"].keys()
    assert not left_out, "params.yaml shows every setting of the first stage"


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "")) == Settings()


def test_an_override_changes_one_setting_only(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {ways: 4}")
    settings = load_settings(path, ["train.optimizer.learning_rate=1e-2", "evaluate.shots=[2]"])
    assert settings.train.optimizer.learning_rate == 0.01
    assert settings.evaluate.shots == (2,)
    assert settings.train.ways == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {ways: 0}", ["train.ways", "0", "1"]),
        ("train: {way: 5}", ["train.way", "no such setting"]),
        ("train: {inner_steps: many}", ["train.inner_steps", "many"]),
        ("train: {optimizer: {learning_rate: .nan}}", ["train.optimizer.learning_rate"]),
        ("train: {model: {hidden: []}}", ["train.model.hidden", "1"]),
        ("train: {model: {hidden: [9, 9, 9, 9, 9]}}", ["train.model.hidden", "4"]),
        ("train: {model: {hidden: [0]}}", ["train.model.hidden.0", "0", "1"]),
        ("train: {optimizer: {name: lion}}", ["train.optimizer.name", "lion", "adam"]),
        ("train: {replacement: true, inner_batch: 99}", ["inner_batch = 99", "50"]),
        ("train: {tail_shots: 2}", ["tail_shots", "fomaml"]),
        ("train: {algorithm: fomaml, tail_shots: 10}", ["tail_shots = 10", "train_shots"]),
        ("prepare: {validation: 0.5, test: 0.5}", ["validation + test", "below 1"]),
        ("evaluate: {shots: []}", ["evaluate.shots"]),
        ("evaluate: {tasks: 1}", ["evaluate.tasks", "1", "2"]),
        ("train: [", ["YAML"]),
        ("- 1", ["mapping"]),
    ],
)
def test_a_bad_value_is_named_with_its_limit(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_settings(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "override", ["train.ways", "=5", "train..ways=5", "train.ways.x=5", "a=[:"]
)
def test_a_malformed_override_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load_settings(write(tmp_path, "train: {ways: 4}"), [override])


def test_a_missing_file_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--params"):
        load_settings(tmp_path / "none.yaml")
