import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, TensorDataset
from torchvision.datasets import ImageFolder

from reptile.data.arrays import from_arrays, from_torch
from reptile.data.dataset import PreparedData, Split
from reptile.data.prepare import prepare
from reptile.errors import InputError
from reptile.settings import PrepareSettings

CLASSES, IMAGES = 10, 4


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


LABELS = np.repeat(np.arange(CLASSES), IMAGES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten classes of four images in colour, in five groups of two."""
    images = pixels(CLASSES, IMAGES, 6, 6, 3)
    for c, i in np.ndindex(CLASSES, IMAGES):
        path = tmp_path / f"images/class{c}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[c, i]).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("seed", [0, 7])
def test_an_image_folder_of_torchvision_is_what_prepare_makes_of_the_folder(
    folder: Path, tmp_path: Path, seed: int
) -> None:
    settings = PrepareSettings(
        source=str(folder),
        cross_domain=(),
        image_size=6,
        held_out="classes",
        validation=0.2,
        test=3,
        split_seed=seed,
        rotations=False,
        images_per_class=IMAGES,
    )
    prepared = prepare(settings, tmp_path / "out")
    splits: dict[Split, float] = {"validation": 0.2, "test": 3}
    data = from_torch(ImageFolder(str(folder)), splits=splits, split_seed=seed, name="images")
    assert data.classes == prepared.classes
    assert data.name == prepared.name and data.image_shape == prepared.image_shape
    assert np.array_equal(data.images, prepared.images)
    assert data.content_sha256 == prepared.content_sha256
    assert data.splits_sha256 == prepared.splits_sha256


def test_groups_are_held_out_as_prepare_holds_them_out(folder: Path, tmp_path: Path) -> None:
    for c in range(CLASSES):
        (folder / f"class{c}").rename(folder / f"class{c}_")
        (folder / f"group{c // 2}").mkdir(exist_ok=True)
        (folder / f"class{c}_").rename(folder / f"group{c // 2}/class{c}")
    settings = PrepareSettings(
        source=str(folder), cross_domain=(), image_size=6, rotations=False, images_per_class=IMAGES
    )
    prepared = prepare(settings, tmp_path / "out")
    images = pixels(CLASSES, IMAGES, 6, 6, 3).reshape(-1, 6, 6, 3).transpose(0, 3, 1, 2)
    labels = [f"class{c}" for c in LABELS]
    groups = [f"group{c // 2}" for c in LABELS]
    data = from_arrays(images, labels, groups=groups, name="images")
    assert data.classes == prepared.classes
    assert data.content_sha256 == prepared.content_sha256
    assert data.splits_sha256 == prepared.splits_sha256


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, list])
def test_shuffled_rows_come_in_the_order_of_their_classes_names(make: Any) -> None:
    order = np.random.default_rng(1).permutation(len(LABELS))
    inputs = numbers(len(LABELS), 5)
    data = from_arrays(torch.from_numpy(inputs[order]), make(LABELS[order]))
    assert [c.name for c in data.classes] == sorted(map(str, range(CLASSES)))
    for c in data.classes:
        rows = {tuple(row) for row in data.images[c.start : c.start + c.count]}
        assert rows == {tuple(row) for row in inputs[int(c.name) == LABELS]}


def test_rows_that_lie_together_are_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "inputs.npy", pixels(len(LABELS), 1, 3, 3))
    mapped = np.load(tmp_path / "inputs.npy", mmap_mode="r")
    labels = LABELS[::-1]  # together, in another order than that of their names
    data = from_arrays(mapped, labels)
    assert np.shares_memory(data.images, mapped)
    for c in data.classes:
        assert (labels[c.start : c.start + c.count] == int(c.name)).all()
    own = pixels(len(LABELS), 1, 3, 3)
    assert np.shares_memory(from_arrays(own, labels).images, own)
    own[0] = 0  # still the caller's to write
    assert not from_arrays(own, labels).images.flags.writeable


@pytest.mark.parametrize("shape", [(7,), (3, 11), (2, 3, 4, 5), (1, 12, 12)])
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    data = from_arrays(numbers(len(LABELS), *shape), LABELS)
    assert data.image_shape == shape
    assert data.split("train").counts.sum() == IMAGES * 7
    assert data.values == 0


def test_float64_is_used_as_float32() -> None:
    data = from_arrays(numbers(len(LABELS), 2).astype(float), LABELS)
    assert data.images.dtype == np.float32
    assert data.content_sha256 == from_arrays(numbers(len(LABELS), 2), LABELS).content_sha256


def test_values_of_named_tasks_are_a_regression() -> None:
    order = np.random.default_rng(2).permutation(len(LABELS))
    x, y = numbers(len(LABELS), 1), numbers(len(LABELS), 2)
    tasks = np.array([f"person{label:02}" for label in LABELS])
    data = from_arrays(x[order], y[order], tasks=tasks[order], splits={"validation": 0, "test": 4})
    assert data.values == 2 and data.targets is not None
    assert sorted(map(tuple, np.hstack([data.images, data.targets]))) == sorted(
        map(tuple, np.hstack([x, y]))
    )
    assert [c.name for c in data.classes] == [f"person{label:02}" for label in range(CLASSES)]
    assert len(data.split("test").starts) == 4
    single = from_arrays(x, y[:, 0], tasks=tasks)
    assert single.targets is not None and single.targets.shape == (len(x), 1)


def test_the_hash_is_of_inputs_targets_and_classes() -> None:
    x, y = numbers(len(LABELS), 3), numbers(len(LABELS))
    hashes = {
        from_arrays(inputs, values, tasks=LABELS + plus).content_sha256
        for inputs, values, plus in [(x, y, 0), (x + 1, y, 0), (x, y + 1, 0), (x, y, 1)]
    }
    assert len(hashes) == 4
    first, again = (from_arrays(x, LABELS, split_seed=seed) for seed in (0, 1))
    assert first.content_sha256 == again.content_sha256
    assert first.splits_sha256 != again.splits_sha256


def test_lists_of_names_say_the_split() -> None:
    inputs, names = numbers(len(LABELS), 3), [f"é{label}" for label in LABELS]
    data = from_arrays(inputs, names, splits={"validation": ["e\u03011"], "test": ["é0", "é9"]})
    assert {c.name for c in data.classes if c.split == "test"} == {"é0", "é9"}
    assert {c.name for c in data.classes if c.split == "validation"} == {"é1"}
    numbered = from_arrays(inputs, LABELS, splits={"test": [3, 4]})
    assert {c.name for c in numbered.classes if c.split == "test"} == {"3", "4"}
    with pytest.raises(InputError, match="class 2 of arrays is in no split"):
        from_arrays(inputs, LABELS, splits={"train": [0, 1], "test": range(3, 10)})


def test_two_ways_to_write_a_letter_are_one_class() -> None:
    labels = ["café", "cafe\u0301", "b", "b", "c", "c"]
    data = from_arrays(numbers(6, 2), labels, splits={"test": ["b"]})
    assert sorted((c.name, c.count) for c in data.classes) == [("b", 2), ("c", 2), ("café", 2)]


class Pairs(Dataset[Any]):
    def __init__(self, *pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> Any:
        return self.pairs[number]


def test_any_torch_dataset_of_pairs() -> None:
    inputs = torch.from_numpy(numbers(len(LABELS), 2, 5))
    tensors: Any = TensorDataset(inputs, torch.from_numpy(LABELS))
    wanted = from_arrays(inputs, LABELS)
    datasets: list[Any] = [
        tensors,
        ConcatDataset([tensors]),
        Pairs(*((np.asarray(x), int(y)) for x, y in tensors)),
        Pairs(*((x, str(int(y))) for x, y in tensors)),
    ]
    for dataset in datasets:
        data = from_torch(dataset)
        assert data.content_sha256 == wanted.content_sha256
        assert data.splits_sha256 == wanted.splits_sha256
        assert data.name == type(dataset).__name__


def test_a_torch_dataset_with_values_to_predict() -> None:
    x, y = numbers(len(LABELS), 1), numbers(len(LABELS), 2)
    dataset = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    data = from_torch(dataset, tasks=LABELS)
    assert data.content_sha256 == from_arrays(x, y, tasks=LABELS).content_sha256


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_are_grey_or_rgb_pixels(mode: str) -> None:
    picture = Image.fromarray(pixels(5, 4, 3)).convert(mode)
    grey = mode in ("1", "L", "LA")
    wanted = np.asarray(picture.convert("L" if grey else "RGB")).reshape(5, 4, -1)
    data = from_torch(Pairs((picture, "a"), (picture, "b")), splits={"test": ["b"]})
    assert data.image_shape == (1 if grey else 3, 5, 4)
    assert np.array_equal(data.images[0], wanted.transpose(2, 0, 1))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(0, 0)])


BAD: dict[str, tuple[Any, str]] = {
    "integers": (lambda: from_arrays(LABELS[:, None], LABELS), "inputs are int64: give pixels"),
    "no channels": (lambda: from_arrays(pixels(40, 9, 9), LABELS), "images are .N, C, H, W."),
    "channels last": (lambda: from_arrays(pixels(40, 9, 9, 3), LABELS), "with 1 or 3 channels"),
    "numbers": (lambda: from_arrays(numbers(40), LABELS), r"shape \[40\]: .* are \[N, 1\]"),
    "nothing": (lambda: from_arrays(numbers(0, 3), LABELS), r"inputs of shape \[0, 3\]"),
    "few labels": (lambda: from_arrays(numbers(41, 3), LABELS), r"targets of shape \[40\] for 41"),
    "one-hot": (lambda: from_arrays(numbers(40, 3), np.eye(40, dtype=int)), r"\[40, 40\] for 40"),
    "float labels": (lambda: from_arrays(numbers(40, 3), numbers(40)), "give `tasks`"),
    "missing label": (lambda: from_arrays(numbers(2, 3), ["a", None]), "targets are object"),
    "hidden label": (lambda: from_arrays(numbers(2, 3), ["a", "b\n"]), r"'b\\n' cannot be shown"),
    "few groups": (
        lambda: from_arrays(numbers(40, 3), LABELS, groups=LABELS[1:]),
        r"groups of shape \[39\]",
    ),
    "not a number": (
        lambda: from_arrays(np.where(np.arange(40)[:, None] == 33, np.nan, 0.0), LABELS),
        "inputs: row 33 has numbers that are not finite",
    ),
    "infinite value": (
        lambda: from_arrays(numbers(2, 3), [np.inf, 0], tasks=["a", "b"], splits={"test": ["a"]}),
        "targets: row 0 has numbers",
    ),
    "pixels and values": (
        lambda: from_arrays(pixels(40, 1, 3, 3), numbers(40), tasks=LABELS),
        "with `tasks` .regression. give float32",
    ),
    "text to predict": (
        lambda: from_arrays(numbers(2, 3), ["a", "b"], tasks=["a", "b"]),
        "must be numbers",
    ),
    "few values": (
        lambda: from_arrays(numbers(40, 3), numbers(39), tasks=LABELS),
        r"targets of shape \[39\] for 40 inputs: expected \[40\] or \[40, outputs\]",
    ),
    "too few classes": (
        lambda: from_arrays(numbers(2, 3), ["a", "b"]),
        "leave none of 2 classes for",
    ),
    "shares above 1": (
        lambda: from_arrays(numbers(40, 3), LABELS, splits={"validation": 0.6, "test": 0.6}),
        r"splits: .*validation \+ test = 1.2",
    ),
    "no test": (lambda: from_arrays(numbers(40, 3), LABELS, splits={"validation": 1}), "test = 0"),
    "unknown split": (
        lambda: from_arrays(numbers(40, 3), LABELS, splits={"val": 1}),  # type: ignore[dict-item]
        "'val' is none of train, validation, test",
    ),
    "share for training": (
        lambda: from_arrays(numbers(40, 3), LABELS, splits={"train": 0.5, "test": 0.5}),
        "is whatever",
    ),
    "numbers and lists": (
        lambda: from_arrays(numbers(40, 3), LABELS, splits={"validation": 1, "test": [1]}),
        "give all in one way",
    ),
    "unknown name": (
        lambda: from_arrays(numbers(40, 3), LABELS, splits={"test": ["cat"]}),
        "arrays has no class or group 'cat'",
    ),
    "no length": (lambda: from_torch(Stream()), "Stream: only datasets with a length"),
    "empty": (lambda: from_torch(Pairs()), "Pairs: the dataset is empty"),
    "no pairs": (lambda: from_torch(Pairs(1, 2)), "item 0 of the dataset: expected a pair"),
    "two shapes": (
        lambda: from_torch(Pairs((np.zeros((1, 2)), 0), (np.zeros((2, 1)), 0))),
        r"item 1 of the dataset: float64 \[2, 1\], the first one is float64 \[1, 2\]; .* resizes",
    ),
    "label of two": (
        lambda: from_torch(Pairs((np.zeros(2), np.zeros(2)))),
        r"a label of shape \[2\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_one_clear_sentence(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_example_in_the_docs_runs_as_it_stands(
    folder: Path, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs/data.md").read_text("utf-8"), re.S)
    (code,) = (block for block in blocks if "import reptile\n" in block)
    folder.rename(tmp_path / "birds")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert isinstance(names["data"], PreparedData)
    assert len(names["data"].classes) == CLASSES
