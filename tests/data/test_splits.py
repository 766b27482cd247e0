import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from published import BACKGROUND, CIFAR_CLASSES, EVALUATION, OMNIGLOT

from reptile.data.dataset import Split
from reptile.data.readers.base import Source, SourceClass
from reptile.data.splits import PUBLISHED, assign_splits, load_split_list
from reptile.errors import InputError
from reptile.settings import PUBLISHED_SPLITS, PrepareSettings, load_settings


def source_of(names: list[str], published: dict[str, Split] | None = None) -> Source:
    def unread(file: str) -> Image.Image:
        raise AssertionError("splits must not read images")

    classes = (SourceClass(name, name.rpartition("/")[0], ("a.png",)) for name in sorted(names))
    return Source("some", tuple(classes), unread, published or {})


def splits_of(names: list[str], held_out: str, **changes: object) -> dict[str, Split]:
    settings = PrepareSettings.model_validate({"held_out": held_out, **changes})
    return assign_splits(source_of(names), settings)


def counts(splits: dict[str, Split]) -> tuple[int, int, int]:
    of = Counter(splits.values())
    return of["train"], of["validation"], of["test"]


WHOLE = {
    "omniglot-vinyals": (OMNIGLOT, (1028, 172, 423)),
    "cifar-fs": (CIFAR_CLASSES, (64, 16, 20)),
    "fc100": (CIFAR_CLASSES, (60, 20, 20)),
}


def test_every_published_list_is_a_setting_and_is_tested_here() -> None:
    files = {path.stem for path in PUBLISHED.iterdir()}
    assert files == set(PUBLISHED_SPLITS) == set(WHOLE)


@pytest.mark.parametrize("name", WHOLE)
def test_a_published_list_has_its_published_counts_on_the_whole_dataset(name: str) -> None:
    names, published = WHOLE[name]
    splits = splits_of(names, name)
    assert counts(splits) == published
    assert set(splits) == set(names)
    assert load_split_list(name).source


@pytest.mark.parametrize("name", WHOLE)
def test_a_published_list_is_refused_where_classes_are_missing(name: str) -> None:
    names, _ = WHOLE[name]
    with pytest.raises(InputError, match="is a part of the data missing"):
        splits_of(names[:-1], name)
    with pytest.raises(InputError, match="is a part of the data missing"):
        splits_of(names[1:], name)


def test_omniglot_as_in_the_reptile_code_is_1200_and_423_characters() -> None:
    assert len(OMNIGLOT) == sum(BACKGROUND.values()) + sum(EVALUATION.values()) == 1623
    splits = splits_of(OMNIGLOT, "classes", test=423, validation=0)
    assert counts(splits) == (1200, 0, 423)
    assert splits == splits_of(OMNIGLOT[::-1], "classes", test=423, validation=0)


def test_omniglot_by_alphabet_divides_no_alphabet() -> None:
    splits = splits_of(OMNIGLOT, "groups", test=10, validation=5)
    of_alphabet = {(name.split("/")[0], split) for name, split in splits.items()}
    assert Counter(split for _, split in of_alphabet) == {"train": 35, "validation": 5, "test": 10}


def test_a_file_may_name_classes_or_groups_and_leave_training_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"validation": ["a"], "test": ["b/2"]}))
    splits = splits_of(["a/1", "a/2", "b/1", "b/2"], str(path))
    assert splits == {"a/1": "validation", "a/2": "validation", "b/1": "train", "b/2": "test"}


BAD_LISTS: dict[str, tuple[dict[str, object], str]] = {
    "in two splits": ({"train": ["a"], "test": ["a"]}, "a is in train and in test"),
    "class and group": ({"validation": ["a"], "test": ["a/1"]}, "a/1 is named, and its group too"),
    "unknown": ({"test": ["c", "d"]}, "no class or group 'c' and lacks 1 more"),
    "left out": ({"train": ["a"], "test": ["b/1"]}, "b/2 of some is in no split"),
    "nothing to train on": ({"test": ["a", "b"]}, "no class for train"),
    "nothing to test on": ({"test": []}, "no class for test"),
    "no test": ({"train": ["a"]}, r"mine\.json: test"),
    "no such key": ({"test": ["a"], "valid": ["b"]}, "valid: no such setting"),
    "other counts": ({"test": ["a"], "counts": {"test": 3}}, "2 classes of some for test, .* 3"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_list_that_does_not_fit_is_one_clear_error(tmp_path: Path, case: str) -> None:
    content, message = BAD_LISTS[case]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        splits_of(["a/1", "a/2", "b/1", "b/2"], str(path))
    assert "\n" not in str(caught.value)


def test_a_list_that_is_not_there_or_no_json_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        splits_of(["a"], str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    for content in (b"{", b"", b"[]", b'{"test": "a"}', b"\xff\xfe{\x00", b"[" * 100_000):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.json: (?! = )") as caught:
            splits_of(["a"], str(tmp_path / "bad.json"))
        assert "\n" not in str(caught.value)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=r"folder\.json: cannot be read"):
        splits_of(["a"], str(tmp_path / "folder.json"))


def test_a_list_with_a_split_twice_is_refused_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    """Of two Python would take the last, and train on what the first was to hold out."""
    path = tmp_path / "mine.json"
    path.write_text('{"test": ["a"], "validation": ["c"], "test": ["b"]}')
    with pytest.raises(InputError, match=r"mine\.json: test is given twice"):
        splits_of(["a", "b", "c"], str(path))
    path.write_text('{"test": ["a"]}', encoding="utf-8-sig")
    assert splits_of(["a", "b", "c"], str(path)) == {"a": "test", "b": "train", "c": "train"}


def test_a_source_without_a_split_of_its_own_says_so() -> None:
    with pytest.raises(InputError, match="its files tell no split; set held_out"):
        splits_of(["a", "b", "c"], "published")


def test_whole_numbers_hold_out_so_many_and_too_many_are_refused() -> None:
    names = [str(number) for number in range(10)]
    assert counts(splits_of(names, "classes", validation=3, test=2)) == (5, 3, 2)
    assert counts(splits_of(names, "classes", validation=0, test=0.2)) == (8, 0, 2)
    with pytest.raises(
        InputError,
        match=r"5 for test and 5 for validation .* leave none of 10 classes for training",
    ):
        splits_of(names, "classes", validation=5, test=5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("test=0", "test = 0: evaluation needs classes"),
        ("test=1.0", r"1\.0 must be between 0 and 1, or a whole number"),
        ("validation=-1", "-1 must be between 0 and 1, or a whole number"),
        ("validation=0.0", r"0\.0 must be between 0 and 1"),
        ("held_out=alphabets", "'alphabets' must be groups, classes, published, cifar-fs"),
    ],
)
def test_a_bad_setting_is_named_with_its_limit(root: Path, setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings(root / "params.yaml", [f"prepare.{setting}"])
