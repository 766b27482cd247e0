import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reptile.data.dataset import PreparedData, load_cross_domain, load_prepared
from reptile.data.prepare import prepare
from reptile.data.readers.base import Source, SourceClass
from reptile.data.splits import assign_splits
from reptile.errors import InputError
from reptile.settings import PrepareSettings

GROUPS, CLASSES, IMAGES = 5, 2, 3


def settings_of(folder: Path, **changes: object) -> PrepareSettings:
    values: dict[str, object] = {
        "source": str(folder),
        "cross_domain": (),
        "image_size": 6,
        "validation": 0.2,
        "test": 0.2,
        "images_per_class": IMAGES,
        **changes,
    }
    return PrepareSettings.model_validate(values)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(seed: int, shape: tuple[int, ...] = (9, 7)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five groups of two classes of three grey 7×9 images."""
    for seed, (group, name, image) in enumerate(np.ndindex(GROUPS, CLASSES, IMAGES)):
        save(tmp_path / f"images/g{group}/c{name}/{image}.png", noise(seed))
    return tmp_path / "images"


def test_images_equal_an_independent_reading(folder: Path, tmp_path: Path) -> None:
    data = prepare(settings_of(folder), tmp_path / "out")
    assert data.images.shape[1:] == data.image_shape == (1, 6, 6)
    for c in data.classes[: GROUPS * CLASSES]:
        paths = sorted((folder / c.name).iterdir())
        expected = [
            np.asarray(Image.open(p).resize((6, 6), Image.Resampling.LANCZOS)) for p in paths
        ]
        assert np.array_equal(data.images[c.start : c.start + c.count, 0], expected)


def test_images_of_the_right_size_are_left_as_they_are(folder: Path, tmp_path: Path) -> None:
    save(folder / "g0/c0/0.png", noise(0, (6, 6)))
    data = prepare(settings_of(folder), tmp_path / "out")
    assert np.array_equal(data.images[0, 0], noise(0, (6, 6)))


def test_rotations_are_turned_training_images_and_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    data = prepare(settings_of(folder), tmp_path / "out")
    upright = {c.name: c for c in data.classes if c.rotation == 0}
    training = {name for name, c in upright.items() if c.split == "train"}
    for rotation in (90, 180, 270):
        turned = {c.name: c for c in data.classes if c.rotation == rotation}
        assert set(turned) == training
        for name, c in turned.items():
            start = upright[name].start
            for image in range(c.count):
                expected = np.rot90(data.images[start + image, 0], rotation // 90)
                assert np.array_equal(data.images[c.start + image, 0], expected)
                assert c.split == "train"


def test_no_group_is_in_two_splits(folder: Path, tmp_path: Path) -> None:
    data = prepare(settings_of(folder), tmp_path / "out")
    groups = {
        split: {c.group for c in data.classes if c.split == split}
        for split in ("train", "validation", "test")
    }
    assert sorted(len(names) for names in groups.values()) == [1, 1, 3]
    assert len(set.union(*groups.values())) == GROUPS


def source_of(names: list[str]) -> Source:
    def unread(file: str) -> Image.Image:
        raise AssertionError("splits must not read images")

    classes = (SourceClass(name, name.partition("/")[0], ("a.png",)) for name in names)
    return Source("some", tuple(classes), unread)


def test_splits_depend_on_names_and_split_seed_only(tmp_path: Path) -> None:
    names = [f"g{group}/c{name}" for group in range(30) for name in range(3)]
    settings = settings_of(tmp_path)
    splits = assign_splits(source_of(names), settings)
    other_settings = settings_of(tmp_path, image_size=9, rotations=False, images_per_class=1)
    assert assign_splits(source_of(names[::-1]), other_settings) == splits
    assert assign_splits(source_of(names), settings_of(tmp_path, split_seed=1)) != splits
    more = assign_splits(source_of([*names, "new/c0"]), settings)
    assert sum(more[name] != splits[name] for name in names) <= 2 * 3


def test_held_out_classes_split_within_groups(folder: Path, tmp_path: Path) -> None:
    data = prepare(settings_of(folder, held_out="classes", rotations=False), tmp_path / "out")
    counts = [len(data.split(split).starts) for split in ("train", "validation", "test")]
    assert counts == [6, 2, 2]


def test_hashes_tell_what_has_changed(folder: Path, tmp_path: Path) -> None:
    def hashes(**changes: object) -> tuple[str, str]:
        data = prepare(settings_of(folder, **changes), tmp_path / "out")
        return data.content_sha256, data.splits_sha256

    content, splits = hashes()
    assert hashes() == (content, splits)
    assert hashes(split_seed=1, rotations=False)[1] != splits
    pixels = noise(0)
    pixels[4, 3] ^= 255
    save(folder / "g0/c0/0.png", pixels)
    changed_content, same_splits = hashes()
    assert changed_content != content
    assert same_splits == splits


def test_colour_stays_colour_and_conversions_happen_when_asked(tmp_path: Path) -> None:
    for seed, (name, image) in enumerate(np.ndindex(3, IMAGES)):
        save(tmp_path / f"images/c{name}/{image}.png", noise(seed, (8, 8, 3)))
    settings = settings_of(tmp_path / "images", held_out="classes", validation=0.3, test=0.3)
    data = prepare(settings, tmp_path / "out")
    first = np.asarray(
        Image.fromarray(noise(0, (8, 8, 3))).resize((6, 6), Image.Resampling.LANCZOS)
    )
    assert np.array_equal(data.images[0], first.transpose(2, 0, 1))
    grey = prepare(settings.model_copy(update={"channels": "grey"}), tmp_path / "grey")
    assert grey.image_shape == (1, 6, 6)


def test_cross_domain_sources_get_the_main_shape_and_only_a_test_split(
    folder: Path, tmp_path: Path
) -> None:
    prepare(settings_of(folder, channels="rgb", cross_domain=("digits",)), tmp_path / "out")
    digits = load_cross_domain(tmp_path / "out")["digits"]
    assert digits.image_shape == (3, 6, 6)
    assert {c.split for c in digits.classes} == {"test"}
    assert len(digits.split("test").starts) == 10
    assert len(digits.images) == 1797


def test_progress_reaches_the_total_and_never_goes_back(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    settings = settings_of(folder, cross_domain=("digits",))
    prepare(settings, tmp_path / "out", lambda done, total: seen.append((done, total)))
    total = GROUPS * CLASSES * IMAGES + 1797
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert {total for _, total in seen} == {total}


def spoil_with_colour(folder: Path) -> None:
    save(folder / "g3/c1/2.png", noise(0, (5, 5, 3)))


def spoil_with_garbage(folder: Path) -> None:
    (folder / "g3/c1/2.png").write_bytes(b"\x89PNG garbage")


def spoil_with_too_few_images(folder: Path) -> None:
    (folder / "g3/c1/2.png").unlink()


def spoil_nothing(folder: Path) -> None:
    pass


BAD: dict[str, tuple[Callable[[Path], None], dict[str, object], str]] = {
    "mixed channels": (
        spoil_with_colour,
        {},
        r"g0/c0/0\.png is grey and g3/c1/2\.png is in colour; set channels",
    ),
    "garbage": (spoil_with_garbage, {}, r"g3/c1/2\.png: cannot be read"),
    "few images": (
        spoil_with_too_few_images,
        {},
        "class g3/c1 has 2 of the 3 images that images_per_class asks for",
    ),
    "few groups": (
        spoil_nothing,
        {"validation": 0.45, "test": 0.54},
        "3 for test and 2 for validation .* leave none of 5 groups for .*set held_out: classes",
    ),
    "few classes": (
        spoil_nothing,
        {"validation": 0.49, "test": 0.5, "held_out": "classes"},
        "leave none of 10 classes for training; lower test = 0.5, or validation = 0.49",
    ),
    "no groups": (
        spoil_nothing,
        {"source": "digits"},
        "lie in no groups.*set held_out: classes",
    ),
    "cross-domain names": (
        spoil_nothing,
        {"cross_domain": ("digits", "digits")},
        "two sources of one name",
    ),
    "missing cross-domain source": (spoil_nothing, {"cross_domain": ("nowhere",)}, "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_error_is_clear_and_leaves_the_old_data_whole(
    folder: Path, tmp_path: Path, case: str
) -> None:
    spoil, changes, message = BAD[case]
    before = prepare(settings_of(folder), tmp_path / "made/out").content_sha256
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        prepare(settings_of(folder, **changes), tmp_path / "made/out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out"]
    assert load_prepared(tmp_path / "made/out").content_sha256 == before


def test_a_small_cross_domain_class_is_an_error_that_names_it(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "other/a/1.png", noise(0))
    with pytest.raises(InputError, match="other: class a has 1 of the 3 images"):
        prepare(settings_of(folder, cross_domain=(str(tmp_path / "other"),)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def prepared(folder: Path, tmp_path: Path) -> Path:
    prepare(settings_of(folder), tmp_path / "out")
    return tmp_path / "out"


def test_loading_gives_what_was_prepared_read_only(prepared: Path) -> None:
    data: PreparedData = load_prepared(prepared)
    assert data.name == "images"
    assert isinstance(data.images, np.memmap)
    assert not data.images.flags.writeable
    split = data.split("train")
    assert split.starts.dtype == split.counts.dtype == np.int64
    assert split.counts.sum() == 4 * 3 * CLASSES * IMAGES


def damage_json(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / "dataset.json").read_text())
        change(values)
        (folder / "dataset.json").write_text(json.dumps(values))

    return damage


def damage_images(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        changed = change(np.load(folder / "images.npy"))
        np.save(folder / "images.npy", changed)

    return damage


def break_json(folder: Path) -> None:
    (folder / "dataset.json").write_text("{")


def edit_a_split(values: dict[str, Any]) -> None:
    first = values["classes"][0]
    first["split"] = "train" if first["split"] == "test" else "test"


def cut_images(folder: Path) -> None:
    content = (folder / "images.npy").read_bytes()
    (folder / "images.npy").write_bytes(content[:-1])


def pickle_images(folder: Path) -> None:
    content = BytesIO()
    np.save(content, np.array([{}], dtype=object), allow_pickle=True)
    (folder / "images.npy").write_bytes(content.getvalue())


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lambda folder: (folder / "dataset.json").unlink(), "dataset.json: no such file"),
    "no images": (lambda folder: (folder / "images.npy").unlink(), "images.npy: no such file"),
    "no JSON": (break_json, "damaged"),
    "another format": (damage_json(lambda v: v.update(format=2)), "format = 2"),
    "unknown split": (damage_json(lambda v: v["classes"][0].update(split="x")), "split = 'x'"),
    "missing key": (damage_json(lambda v: v.pop("name")), "name"),
    "moved class": (damage_json(lambda v: v["classes"][1].update(start=2)), "g0/c1 is out of"),
    "negative start": (damage_json(lambda v: v["classes"][0].update(start=-1)), "start = -1"),
    "range outside": (damage_json(lambda v: v["classes"][-1].update(count=9)), "images, the class"),
    "edited split": (damage_json(edit_a_split), "by hand"),
    "dtype": (damage_images(lambda images: images.astype(np.float32)), "float32 of shape"),
    "shape": (
        damage_images(lambda images: images[:, :, 1:]),
        r"expected uint8 of shape",
    ),
    "cut off": (cut_images, "damaged"),
    "pickle": (pickle_images, "damaged"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_an_error_that_says_what_to_do(prepared: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    damage(prepared)
    with pytest.raises(InputError, match=message) as caught:
        load_prepared(prepared)
    assert "run `reptile prepare`" in str(caught.value)
    assert str(prepared) in str(caught.value)
