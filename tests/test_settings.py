from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from reptile.errors import InputError
from reptile.settings import Section, Settings, load_settings


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
        ("evaluate: {shots: []}", ["evaluate.shots = []: List should have at least 1 item"]),
        ("evaluate: {shots: [0]}", ["evaluate.shots.0 = 0: Input should be greater than"]),
        ("evaluate: {tasks: 1}", ["evaluate.tasks", "1", "2"]),
        ("train: [", ["YAML"]),
        ("train: {ways: 5}\ntrain: {seed: 1}", ["train is given twice", "line 2"]),
        ("train: {ways: 5, seed: 1, ways: 6}", ["ways is given twice"]),
        ("train: {model: {filters: 4, filters: 8}}", ["filters is given twice"]),
        ("prepare: {test: yes}", ["prepare.test: true: YAML reads true, yes and on"]),
        ("prepare: {images_per_class: on}", ["prepare.images_per_class: true"]),
        ("evaluate: {shots: [1, on]}", ["evaluate.shots: true"]),
        ("prepare: {table: {inputs: [no]}}", ["prepare.table.inputs: false", "in quotes"]),
        ("train: {meta_step: true}", ["train.meta_step: true"]),
        ("prepare: {cross_domain: digits}", ["prepare.cross_domain = 'digits'", "a list such as"]),
        ("prepare: {validation: some}", ["prepare.validation = 'some': ", " or a valid number"]),
        ("prepare: {order: null}", ["prepare.order = None: ", "a valid boolean or a valid string"]),
        ("- 1", ["mapping"]),
    ],
)
def test_a_bad_value_is_named_with_its_limit(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_settings(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def whole_numbers(section: type[Section], path: str = "") -> Iterator[str]:
    """Yield the settings that take whole numbers, those of sections within too."""
    for name, field in section.model_fields.items():
        of = field.annotation
        if isinstance(of, type) and issubclass(of, Section):
            yield from whole_numbers(of, f"{path}{name}.")
        elif int in (of, *get_args(of)):
            yield f"{path}{name}"


@pytest.mark.parametrize("value", [10**23, "1e308", ".inf", -(10**23)])
@pytest.mark.parametrize("setting", list(whole_numbers(Settings)))
def test_the_extremes_of_a_whole_number_are_refused_when_it_is_read(
    setting: str, value: object, tmp_path: Path
) -> None:
    """Not when a loop or an array of that length is made, after the stages before."""
    with pytest.raises(InputError, match=setting.replace(".", r"\.")) as caught:
        load_settings(write(tmp_path, "{}"), [f"{setting}={value}"])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "override", ["train.ways", "=5", "train..ways=5", "train.ways.x=5", "a=[:"]
)
def test_a_malformed_override_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load_settings(write(tmp_path, "train: {ways: 4}"), [override])


def test_a_missing_file_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--params"):
        load_settings(tmp_path / "none.yaml")
