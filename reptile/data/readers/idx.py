"""MNIST, EMNIST and their kin: pairs of IDX files of images and labels, gzipped or not.

The images of both published parts are joined by class, as few-shot tasks hold out classes. They
are light on dark, and become dark on white like the other sources.
"""

import gzip
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from reptile.data.folders import open_regular, open_zip
from reptile.data.readers.base import Source, SourceClass
from reptile.data.readers.records import Records, Stream, copy_records, reading
from reptile.errors import InputError

EMNIST_ZIP = "gzip.zip"
EMNIST_SET = "emnist-balanced-"  # of several sets in one place: 47 classes of equal size
FIRST = "train-images-idx3-ubyte"
MAX_BYTES = 2**31
PLACES = (".", "raw", "MNIST/raw", "EMNIST/raw", "gzip")  # torchvision's, and what the zip makes

Files = Mapping[str, Callable[[], AbstractContextManager[Stream]]]
"""How to open each file, by its name without `.gz`."""


class Images(NamedTuple):
    """One IDX file: its records, and the shape of each."""

    records: Records
    shape: tuple[int, ...]


def is_idx(root: Path) -> bool:
    """Say whether `root` holds such files or EMNIST's zip of them, or torchvision's folder does."""
    return (root / EMNIST_ZIP).exists() or _home(root) is not None


@contextmanager
def open_idx(root: Path) -> Iterator[Source]:
    """Open one set of such files; EMNIST's classes are named as its mapping file says.

    Of several sets the balanced one is taken.

    Raises:
        InputError: a file is missing or broken, or there are several sets and none is balanced.
    """
    with ExitStack() as stack, _files(root) as files:
        prefix = _choose(root, files)
        part = "test" if f"{prefix}test-images-idx3-ubyte" in files else "t10k"
        images: dict[str, Images] = {}
        members: dict[int, list[str]] = {}
        for each in ("train", part):
            images[each] = _read(stack, root, files, f"{prefix}{each}-images-idx3-ubyte", 3)
            labels = _read(stack, root, files, f"{prefix}{each}-labels-idx1-ubyte", 1).records
            if len(labels) != len(images[each].records):
                raise InputError(
                    f"{root}: {len(images[each].records):,} {each} images and {len(labels):,} "
                    "labels; download it again"
                )
            of_image = labels.start(1)[:, 0]
            for label in np.unique(of_image):
                places = np.flatnonzero(of_image == label)
                members.setdefault(int(label), []).extend(f"{each}/{place:07}" for place in places)
        names = _class_names(root, files, prefix, sorted(members))

        def read(file: str) -> Image.Image:
            part, _, place = file.partition("/")
            records, shape = images[part]
            image = 255 - records.read(int(place)).reshape(shape)
            return Image.fromarray(image.T if on_its_side else image)

        on_its_side = prefix.startswith("emnist")
        classes = (SourceClass(names[label], "", tuple(members[label])) for label in members)
        name = prefix.rstrip("-") or root.resolve().name
        yield Source(name, tuple(sorted(classes, key=_by_name)), read)


def _by_name(c: SourceClass) -> str:
    return c.name


def _home(root: Path) -> Path | None:
    folders = (root / place for place in PLACES)
    return next((folder for folder in folders if any(folder.glob(f"*{FIRST}*"))), None)


@contextmanager
def _files(root: Path) -> Iterator[Files]:
    home = _home(root)
    if home is None:
        with open_zip(root / EMNIST_ZIP) as (archive, entries):
            yield {
                Path(name).name.removesuffix(".gz"): partial(_unzipped, archive.open, entry, name)
                for name, entry in entries.items()
                if not name.endswith("/")
            }
    else:
        paths = sorted(home.iterdir(), reverse=True)  # a file that is unpacked already comes last
        yield {
            path.name.removesuffix(".gz"): partial(_unzipped, open_regular, path, path.name)
            for path in paths
        }


@contextmanager
def _unzipped(opened: Callable[[Any], IO[bytes]], place: Any, name: str) -> Iterator[Stream]:
    with opened(place) as stream:
        if name.endswith(".gz"):
            with gzip.GzipFile(fileobj=stream) as unzipped:
                yield unzipped
        else:
            yield stream


def _choose(root: Path, files: Files) -> str:
    """Return what the names of the chosen set's files begin with."""
    prefixes = sorted(name.removesuffix(FIRST) for name in files if name.endswith(FIRST))
    if EMNIST_SET in prefixes:
        return EMNIST_SET
    if len(prefixes) != 1:
        listed = ", ".join(prefix.rstrip("-") or "mnist" for prefix in prefixes) or "none"
        raise InputError(
            f"{root}: one set of IDX files is needed, and there are {listed}; "
            "put the files of one set into a separate folder"
        )
    return prefixes[0]


def _read(stack: ExitStack, root: Path, files: Files, name: str, dimensions: int) -> Images:
    """Read one IDX file of bytes with so many dimensions, the first being the number of records."""
    label = f"{root}: {name}"
    if name not in files:
        raise InputError(f"{label}: no such file; download it again")
    with reading(label), files[name]() as stream:
        header = stream.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, 8, dimensions)):
            raise InputError(f"{label}: no IDX file of bytes in {dimensions} dimensions")
        count, *shape = (int(size) for size in np.frombuffer(header, ">u4", offset=4))
        if not 0 < count * prod(shape) <= MAX_BYTES:
            raise InputError(
                f"{label}: promises {count * prod(shape):,} bytes; at most {MAX_BYTES:,}"
            )
        records = stack.enter_context(copy_records(label, stream, prod(shape), count))
        if len(records) < count:
            raise InputError(f"{label}: {len(records):,} of {count:,} records; download it again")
        return Images(records, tuple(shape))


def _class_names(root: Path, files: Files, prefix: str, labels: list[int]) -> dict[int, str]:
    """Name each label: by EMNIST's mapping (label, then codes of characters) or by its number."""
    file = f"{prefix}mapping.txt"
    if file not in files:
        return {label: str(label) for label in labels}
    with reading(f"{root}: {file}"), files[file]() as stream:
        text = stream.read(2**16).decode("ascii")
    if not re.fullmatch(r"(\d+( \d+)+\s*)+", text):
        raise InputError(f"{root}: {file}: each line must be a label and codes of characters")
    rows = (line.split() for line in text.splitlines())
    names = {int(label): "".join(chr(int(code)) for code in codes) for label, *codes in rows}
    if missing := [label for label in labels if not names.get(label, "").isprintable()]:
        raise InputError(f"{root}: {file} has no name for label {missing[0]}")
    return {label: names[label] for label in labels}
