"""Folders of training and test images: a split, one class each, or an error; never a leak."""

import zipfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reptile.data.dataset import PreparedData
from reptile.data.prepare import prepare
from reptile.errors import InputError
from reptile.settings import PrepareSettings


def png(seed: int) -> bytes:
    content = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write(path: Path, folders: list[str], zipped: bool) -> Path:
    """Write two different images into each folder, or into a zip of them."""
    entries = {
        f"{folder}/{image}.png": png(2 * number + image)
        for number, folder in enumerate(folders)
        for image in range(2)
    }
    if zipped:
        with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
        return path.with_suffix(".zip")
    for name, content in entries.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def prepared(source: Path, out: Path, **changes: object) -> PreparedData:
    values = {
        "source": str(source),
        "cross_domain": (),
        "rotations": False,
        "images_per_class": 1,
        "image_size": 4,
    }
    return prepare(PrepareSettings.model_validate(values | changes), out)


def leaks(data: PreparedData) -> set[str]:
    """Names of classes, without all folders above them, that are in more than one split."""
    splits: dict[str, set[str]] = {}
    for c in data.classes:
        splits.setdefault(c.name.rpartition("/")[2], set()).add(c.split)
    return {name for name, of in splits.items() if len(of) > 1}


SPLIT_NAMES = [
    ["train", "test"],
    ["train", "valid", "test"],
    ["Train", "Validation", "TEST"],
    ["training", "testing"],
    ["train", "val"],
    ["train", "dev", "test"],
    ["seg_train", "seg_test"],
    ["train2017", "val2017"],
    ["data/train", "data/test"],
    ["a/b/TRAIN", "a/b/val"],
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("splits", SPLIT_NAMES, ids="-".join)
def test_the_same_classes_in_each_part_are_joined_by_class(
    tmp_path: Path, splits: list[str], zipped: bool
) -> None:
    folders = [f"{split}/bird{n}" for split in splits for n in range(10)]
    source = write(tmp_path / "birds", folders, zipped)
    data = prepared(source, tmp_path / "out", held_out="classes")
    assert {c.name for c in data.classes} == {f"bird{n}" for n in range(10)}
    assert {c.count for c in data.classes} == {2 * len(splits)}
    assert not leaks(data)
    with pytest.raises(InputError, match=r"lie in no groups.* set held_out: classes$"):
        prepared(source, tmp_path / "out", held_out="groups")
    with pytest.raises(InputError, match=r"class bird9 is in .* share no class; set held_out"):
        prepared(source, tmp_path / "out", held_out="published")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("splits", "counts"),
    [
        (["train", "test"], {"train": 4, "test": 4}),
        (["TRAIN", "Valid", "Testing"], {"train": 4, "validation": 4, "test": 4}),
        (["w/train", "w/dev", "w/test"], {"train": 4, "validation": 4, "test": 4}),
    ],
    ids="-".join,
)
def test_other_classes_in_each_part_are_a_published_split(
    tmp_path: Path, splits: list[str], counts: dict[str, int], zipped: bool
) -> None:
    folders = [f"{split}/{place}{n}" for place, split in enumerate(splits) for n in range(4)]
    source = write(tmp_path / "birds", folders, zipped)
    data = prepared(source, tmp_path / "out", held_out="published")
    assert Counter(c.split for c in data.classes) == counts
    assert len({c.name for c in data.classes}) == len(folders)
    with pytest.raises(InputError, match="set held_out: published"):
        prepared(source, tmp_path / "out", held_out="groups")


def test_groups_inside_of_split_folders_stay_groups(tmp_path: Path) -> None:
    folders = [f"{s}/g{g}/c{n}" for s in ("train", "test") for g in range(5) for n in range(2)]
    data = prepared(write(tmp_path / "letters", folders, False), tmp_path / "out")
    splits = {(c.group, c.split) for c in data.classes}
    assert len(splits) == len({group for group, _ in splits}) == 5


BAD = {
    "beside others": (
        ["train/a", "test/a", "extra/a"],
        r"folders test, train look like a split and lie beside others \(extra\)",
    ),
    "inside of classes": (
        ["cat/train", "cat/test", "dog/train", "dog/test"],
        "folders test, train look like a split and are no outermost folders",
    ),
    "inside of domains": (
        ["photo/train/cat", "photo/test/cat", "sketch/train/cat", "sketch/test/cat"],
        "look like a split and are no outermost folders",
    ),
    "images without classes": (["train", "val", "test"], "hold images themselves"),
    "names in two cases": (
        ["train/Cat", "train/dog", "test/cat", "test/cow"],
        "split folders: 'Cat' and 'cat' may be one in two spellings, .* write them alike",
    ),
    "an unknown name": (
        ["train/cat", "train/dog", "holdout/cat"],
        "train looks like a part of a split, and holdout has its class cat too",
    ),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("held_out", ["groups", "classes", "published"])
@pytest.mark.parametrize("case", BAD)
def test_what_may_be_a_split_and_is_laid_out_in_another_way_is_refused(
    tmp_path: Path, case: str, held_out: str, zipped: bool
) -> None:
    folders, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        prepared(write(tmp_path / "x", folders, zipped), tmp_path / "out", held_out=held_out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "folders",
    [
        ["train", "bus", "tram", "ship"],
        ["rail/train", "rail/tram", "road/bus", "lab/test"],
        ["train/steam", "train/diesel", "car/sedan", "plane/jet"],
        ["dev/ka", "dev/kha", "latin/ka", "greek/alpha"],
    ],
    ids="-".join,
)
def test_classes_that_only_sound_like_a_split_are_classes(
    tmp_path: Path, folders: list[str]
) -> None:
    data = prepared(write(tmp_path / "x", folders, False), tmp_path / "out", held_out="classes")
    assert {c.name for c in data.classes} == set(folders)
