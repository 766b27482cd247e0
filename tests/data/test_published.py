import gzip
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published import (
    CIFAR,
    CIFAR_CLASSES,
    FINE,
    SUPERCLASS,
    cifar_files,
    encoded,
    idx,
    mini_imagenet_names,
    noise,
    omniglot_zip,
    write_idx_set,
    write_mini_imagenet,
    write_tar,
)

from reptile.data.dataset import PreparedData
from reptile.data.prepare import prepare
from reptile.data.readers.open import open_source
from reptile.errors import InputError
from reptile.experiments.presets import load_preset
from reptile.settings import PrepareSettings

BACKGROUND = {"Greek": 3, "Latin": 2}
EVALUATION = {"Angelic": 2, "Tengwar": 1}
LABELS = {"train": np.repeat(np.arange(10), 4)[::-1], "t10k": np.arange(10)}


def classes_of(root: Path) -> list[tuple[str, str, int]]:
    with open_source(str(root)) as source:
        return [(c.name, c.group, len(c.files)) for c in source.classes]


def images_of(root: Path, name: str) -> list[np.ndarray]:
    with open_source(str(root)) as source:
        files = next(c.files for c in source.classes if c.name == name)
        return [np.asarray(source.read(file)) for file in files]


def prepared(root: Path, out: Path, **changes: object) -> PreparedData:
    values = {"source": str(root), "cross_domain": (), "rotations": False, "images_per_class": 2}
    return prepare(PrepareSettings.model_validate(values | changes), out)


def counts_of(data: PreparedData) -> dict[str, int]:
    assert len({c.name for c in data.classes}) == len(data.classes), "a class is in two splits"
    return dict(Counter(c.split for c in data.classes))


def write_omniglot(root: Path) -> Path:
    omniglot_zip(root, "images_background", BACKGROUND)
    omniglot_zip(root, "images_evaluation", EVALUATION)
    return root


def unpack(root: Path, into: Path) -> Path:
    for path in root.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(into)
    return into


def test_omniglots_zips_are_one_source_of_all_alphabets(tmp_path: Path) -> None:
    expected = sorted(
        (f"{alphabet}/character{number + 1:02}", alphabet, 2)
        for alphabet, characters in (BACKGROUND | EVALUATION).items()
        for number in range(characters)
    )
    root = write_omniglot(tmp_path / "omniglot")
    assert classes_of(root) == expected
    unpacked = unpack(root, tmp_path / "folders")
    assert classes_of(unpacked) == expected
    torchvisions = tmp_path / "torchvision/omniglot-py"
    unpack(root, torchvisions)
    assert classes_of(torchvisions.parent) == expected
    for one, other in zip(
        images_of(root, "Tengwar/character01"),
        images_of(unpacked, "Tengwar/character01"),
        strict=True,
    ):
        assert one.shape == (105, 105)
        assert np.array_equal(one, other)


def test_half_of_omniglot_says_what_is_missing(tmp_path: Path) -> None:
    root = write_omniglot(tmp_path)
    (root / "images_evaluation.zip").unlink()
    with pytest.raises(InputError, match=r"images_evaluation\.zip.*reptile data download omniglot"):
        classes_of(root)


def test_a_character_in_both_parts_is_an_error(tmp_path: Path) -> None:
    omniglot_zip(tmp_path, "images_background", BACKGROUND)
    omniglot_zip(tmp_path, "images_evaluation", {"Greek": 1, "Angelic": 1})
    with pytest.raises(InputError, match="both parts have Greek/character01"):
        classes_of(tmp_path)


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
def test_mnist_is_dark_on_white_and_joins_both_parts(
    tmp_path: Path, gzipped: bool, place: str
) -> None:
    root = tmp_path / "mnist"
    images = write_idx_set(root / place, LABELS, gzipped=gzipped)
    assert classes_of(root) == [(str(digit), "", 5) for digit in range(10)]
    expected = [
        255 - image
        for part in ("train", "t10k")
        for image, label in zip(images[part], LABELS[part], strict=True)
        if label == 3
    ]
    assert np.array_equal(images_of(root, "3"), expected)


def write_emnist(root: Path, sets: tuple[str, ...] = ("balanced",)) -> dict[str, np.ndarray]:
    """EMNIST's files with three classes, its images lying on their side; balanced's images."""
    labels = {"train": np.array([0, 1, 2] * 3), "test": np.array([2, 1, 0])}
    for name in sets:
        images = write_idx_set(root, labels, prefix=f"emnist-{name}-", size=(6, 6))
        (root / f"emnist-{name}-mapping.txt").write_text("0 48\n1 65\n2 66 98\n")
    return images


def zip_up(folder: Path, path: Path, inner: str) -> Path:
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{inner}/{file.name}")
    return path


def test_emnist_stands_upright_and_is_named_by_its_mapping(tmp_path: Path) -> None:
    images = write_emnist(tmp_path / "files")
    zip_up(tmp_path / "files", tmp_path / "emnist/gzip.zip", "gzip")
    for root in (tmp_path / "files", tmp_path / "emnist"):
        assert classes_of(root) == [("0", "", 4), ("A", "", 4), ("Bb", "", 4)]
        with open_source(str(root)) as source:
            assert source.name == "emnist-balanced"
        assert np.array_equal(images_of(root, "A")[0], 255 - images["train"][1].T)


def test_of_several_emnist_sets_the_balanced_one_is_read(tmp_path: Path) -> None:
    write_emnist(tmp_path / "several", ("letters", "balanced", "digits"))
    with open_source(str(tmp_path / "several")) as source:
        assert source.name == "emnist-balanced"
    write_emnist(tmp_path / "one", ("letters",))
    with open_source(str(tmp_path / "one")) as source:
        assert source.name == "emnist-letters"
    write_emnist(tmp_path / "two", ("letters", "digits"))
    with pytest.raises(
        InputError, match=r"and there are emnist-digits, emnist-letters; .* separate folder"
    ):
        classes_of(tmp_path / "two")


def spoil(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil_file(root: Path) -> None:
        path = root / f"{name}.gz"
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))

    return spoil_file


IMAGES, TEST_LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
BAD_IDX: dict[str, tuple[Callable[[Path], object], str]] = {
    "no labels": (lambda root: (root / f"{TEST_LABELS}.gz").unlink(), "no such file"),
    "not gzipped": (lambda root: (root / f"{IMAGES}.gz").write_bytes(b"hello"), "cannot be read"),
    "cut gzip": (
        lambda root: os.truncate(root / f"{IMAGES}.gz", 2000),
        "cannot be read .*download it again",
    ),
    "cut content": (
        spoil(IMAGES, lambda content: content[:-1]),
        "31,359 bytes are no whole number",
    ),
    "fewer than promised": (spoil(IMAGES, lambda content: content[:-784]), "39 of 40 records"),
    "longer than promised": (spoil(IMAGES, lambda content: content + b"x"), "more than the 31,360"),
    "floats": (spoil(IMAGES, lambda content: content[:2] + b"\x0d" + content[3:]), "no IDX file"),
    "labels for images": (
        spoil(IMAGES, lambda content: content[:3] + b"\x01" + content[4:]),
        "no IDX file of bytes in 3",
    ),
    "promises terabytes": (
        spoil(IMAGES, lambda content: content[:4] + b"\xff" * 12 + content[16:]),
        "promises .* at most",
    ),
    "fewer labels": (
        spoil(TEST_LABELS, lambda content: idx(np.arange(9, dtype=np.uint8))),
        "10 t10k images and 9 labels",
    ),
    "empty": (spoil(TEST_LABELS, lambda content: b""), "no IDX file"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_a_broken_idx_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    break_it, message = BAD_IDX[case]
    write_idx_set(tmp_path, LABELS)
    break_it(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        classes_of(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_ten_digits_make_five_to_train_and_five_to_test(tmp_path: Path) -> None:
    write_idx_set(tmp_path / "mnist", LABELS)
    data = prepared(tmp_path / "mnist", tmp_path / "out", held_out="classes", validation=0, test=5)
    assert counts_of(data) == {"train": 5, "test": 5}
    assert data.image_shape == (1, 28, 28)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "cifar-100"
    files = cifar_files({"train.bin": 3, "test.bin": 1})
    write_tar(root / "cifar-100-binary.tar.gz", files)
    for name, content in files.items():
        path = root.with_name("unpacked") / "cifar-100-binary" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.mark.parametrize("root", ["cifar-100", "unpacked", "unpacked/cifar-100-binary"])
def test_cifar_has_its_classes_and_pixels_in_order(cifar: Path, root: str) -> None:
    where = cifar.parent / root
    assert classes_of(where) == [(name, name.split("/")[0], 4) for name in CIFAR_CLASSES]
    label = FINE.index("clock")
    *training, test = images_of(where, "household_electrical_devices/clock")
    planes = [pixels.transpose(2, 0, 1).ravel() for pixels in (*training, test)]
    assert np.array_equal(planes[:3], noise(0, (3, 100, 3072))[:, label])
    assert np.array_equal(planes[3], noise(1, (1, 100, 3072))[0, label])


@pytest.mark.parametrize(
    ("held_out", "counts"),
    [
        ("cifar-fs", {"train": 64, "validation": 16, "test": 20}),
        ("fc100", {"train": 60, "validation": 20, "test": 20}),
    ],
)
def test_a_cifar_split_has_its_published_counts(
    cifar: Path, tmp_path: Path, held_out: str, counts: dict[str, int]
) -> None:
    data = prepared(cifar, tmp_path / "out", held_out=held_out, image_size=32)
    assert counts_of(data) == counts
    assert data.image_shape == (3, 32, 32)
    assert len(data.images) == 400


def test_fc100_shares_no_superclass_between_splits(cifar: Path, tmp_path: Path) -> None:
    data = prepared(cifar, tmp_path / "out", held_out="fc100", image_size=8)
    splits = {(c.group, c.split) for c in data.classes}
    assert len(splits) == len({group for group, _ in splits}) == len(CIFAR)


def with_member(path: Path, member: tarfile.TarInfo, content: bytes = b"") -> None:
    member.size = len(content)
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(member, io.BytesIO(content))


def link_out(root: Path) -> None:
    member = tarfile.TarInfo("cifar-100-binary/train.bin")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with_member(root / "cifar-100-binary.tar.gz", member)


def climb_out(root: Path) -> None:
    with_member(root / "cifar-100-binary.tar.gz", tarfile.TarInfo("../../train.bin"), b"x")


def write_cifar(root: Path, **changes: bytes) -> None:
    files = cifar_files({"train.bin": 1, "test.bin": 1})
    for name, content in changes.items():
        files[name.replace("_bin", ".bin").replace("_txt", ".txt")] = content
    write_tar(root / "cifar-100-binary.tar.gz", files)


def promise_terabytes(root: Path) -> None:
    member = tarfile.TarInfo("cifar-100-binary/readme.html")
    member.size = 10**12
    with gzip.open(root / "cifar-100-binary.tar.gz", "wb") as archive:
        archive.write(member.tobuf() + bytes(5000))


BAD_CIFAR: dict[str, tuple[Callable[[Path], object], str]] = {
    "the Python version": (
        lambda root: (root / "cifar-100-python.tar.gz").write_bytes(b""),
        "pickle, which can run code.*reptile data download cifar-fs",
    ),
    "no archive": (
        lambda root: (root / "cifar-100-binary.tar.gz").write_bytes(b"hello"),
        "cannot be read",
    ),
    "a link": (link_out, r"no coarse_label_names\.txt in it"),
    "a path that climbs out": (climb_out, r"no coarse_label_names\.txt in it"),
    "a bomb beside the data": (promise_terabytes, "too large for CIFAR-100"),
    "half a record": (lambda root: write_cifar(root, train_bin=b"x" * 3075), "no whole number"),
    "no records": (
        lambda root: write_cifar(root, test_bin=b""),
        r"test\.bin: 0 bytes are no whole",
    ),
    "unknown label": (
        lambda root: write_cifar(root, test_bin=bytes([0, 100]) + bytes(3072)),
        "label without a name",
    ),
    "another group": (
        lambda root: write_cifar(root, test_bin=bytes([3, 0]) + bytes(3072)),
        "a class lies in two groups",
    ),
    "double name": (
        lambda root: write_cifar(root, fine_label_names_txt=b"apple\napple\n"),
        "no list of different names",
    ),
}


@pytest.mark.parametrize("case", BAD_CIFAR)
def test_a_broken_cifar_archive_is_one_clear_error(tmp_path: Path, case: str) -> None:
    break_it, message = BAD_CIFAR[case]
    break_it(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        classes_of(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["images/{file}", "images/{label}/{file}", "{split}/{file}"])
def test_mini_imagenet_is_split_as_its_lists_say(tmp_path: Path, place: str) -> None:
    root = write_mini_imagenet(tmp_path / "mini-imagenet", place=place)
    data = prepared(root, tmp_path / "out", held_out="published", image_size=12)
    assert counts_of(data) == {"train": 64, "validation": 16, "test": 20}
    expected = {
        name: {"val": "validation"}.get(split, split)
        for split, names in mini_imagenet_names().items()
        for name in names
    }
    assert {c.name: c.split for c in data.classes} == expected


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_split_folders_are_a_published_split(tmp_path: Path, validation: str) -> None:
    for split, names in mini_imagenet_names().items():
        for name in names:
            folder = tmp_path / "some" / (validation if split == "val" else split) / name
            folder.mkdir(parents=True)
            for image in range(2):
                (folder / f"{image}.jpg").write_bytes(encoded(noise(image, (4, 4, 3)), "JPEG"))
    data = prepared(tmp_path / "some", tmp_path / "out", held_out="published", image_size=4)
    assert counts_of(data) == {"train": 64, "validation": 16, "test": 20}
    assert {c.name for c in data.classes} == set().union(*mini_imagenet_names().values())


@pytest.mark.parametrize("preset", ["mini-imagenet-5w1s", "mini-imagenet-5w5s"])
def test_the_presets_read_mini_imagenets_grey_and_cmyk_images_as_its_code_does(
    preset: str, tmp_path: Path
) -> None:
    """Some of ILSVRC12's files are so; the reference converts each to RGB."""
    parts = {"n0": "train", "n1": "train", "n2": "val", "n3": "test"}
    modes = {("n0", 3): "L", ("n1", 7): "CMYK", ("n2", 0): "CMYK", ("n3", 19): "L"}
    files = {}
    for name, part in parts.items():
        for number in range(20):
            path = tmp_path / "mini" / part / name / f"{number:02}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(noise(number, (12, 10, 3)))
            picture.convert(modes.get((name, number), "RGB")).save(path)
            files[name, number] = path
    settings = load_preset(preset).settings.prepare.model_copy(
        update={"source": str(tmp_path / "mini")}
    )
    data = prepare(settings, tmp_path / "out")
    assert data.image_shape == (3, 84, 84)
    for name, number in modes:
        start = next(c.start for c in data.classes if c.name == name)
        with Image.open(files[name, number]) as image:
            expected = np.asarray(image.convert("RGB").resize((84, 84), Image.Resampling.LANCZOS))
        difference = data.images[start + number] - expected.transpose(2, 0, 1).astype(float)
        assert np.abs(difference).max() <= 1


def same_name_in_two_folders(root: Path) -> None:
    for folder in ("images", "more"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / "n0153000000000001.jpg").write_bytes(encoded(noise(0, (4, 4)), "JPEG"))


def row_of(path: Path) -> str:
    return path.read_text().splitlines()[1]


def first_of(root: Path) -> str:
    return row_of(root / "train.csv").split(",")[0]


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit_list(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return edit_list


BAD_LISTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "class in two splits": (
        edit("val.csv", ",n01530448", ",n01530000"),
        "n01530000 is in train and in validation",
    ),
    "missing file": (
        lambda root: (root / "images/n0153000000000001.jpg").unlink(),
        r"train\.csv: line 2: no files called n0153000000000001\.jpg",
    ),
    "two files": (same_name_in_two_folders, r"line 2: no files called .* in a folder n01530000"),
    "a row twice": (
        lambda root: edit("test.csv", "label\n", f"label\n{row_of(root / 'test.csv')}\n")(root),
        r"is listed twice \(test\.csv, line 2; test\.csv, line 3\), and would be .* own test",
    ),
    "an image in training and test": (
        lambda root: edit("test.csv", row_of(root / "test.csv"), f"{first_of(root)},n0153")(root),
        r"listed twice \(train\.csv, line 2; test\.csv, line 2\)",
    ),
    "no header": (edit("test.csv", "filename,label\n", ""), "first line must be filename,label"),
    "one column": (edit("test.csv", ",n01530560", ""), "line 2 must be a file's name and its"),
    "no text": (
        lambda root: (root / "test.csv").write_bytes(b"\xff\xfe"),
        r"test\.csv: cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_list_that_does_not_fit_is_one_clear_error(tmp_path: Path, case: str) -> None:
    break_it, message = BAD_LISTS[case]
    root = write_mini_imagenet(tmp_path, images=1)
    break_it(root)
    with pytest.raises(InputError, match=message) as caught:
        classes_of(root)
    assert "\n" not in str(caught.value)


GROWTH = """
import resource, sys
from pathlib import Path
from reptile.settings import PrepareSettings
from reptile.data.prepare import prepare

def peak(source, out):
    settings = PrepareSettings(
        source=source, cross_domain=(), held_out="classes", channels="rgb", image_size=96
    )
    prepare(settings, Path(out))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

print(-peak(sys.argv[1], sys.argv[3]) + peak(sys.argv[2], sys.argv[3]))
"""


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Peak of the resident memory, mapped pages too, of a tenth of the work and of all of it."""
    for name, images in (("small", 600), ("large", 6000)):
        labels = {"train": np.arange(images) % 20, "t10k": np.arange(20)}
        write_idx_set(tmp_path / name, labels, size=(8, 8), gzipped=False)
    arguments = [str(tmp_path / name) for name in ("small", "large", "out")]
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, *arguments], capture_output=True, text=True, check=True
    )
    written = (tmp_path / "out/images.npy").stat().st_size
    assert written > 450e6
    assert int(done.stdout) < 0.1 * written


def test_the_facts_agree_with_each_other() -> None:
    assert len(FINE) == len(CIFAR_CLASSES) == len(SUPERCLASS) == 100
