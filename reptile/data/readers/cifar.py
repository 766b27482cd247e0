"""CIFAR-100 in its binary version: records of two labels and 32×32 pixels in colour.

The Python version is refused: it is a pickle, which can run code when it is read. Which classes are
held out (CIFAR-FS, FC100) is decided in `reptile.data.splits`.
"""

import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from reptile.data.folders import open_regular
from reptile.data.readers.base import Source, SourceClass
from reptile.data.readers.records import Records, Stream, copy_records, reading
from reptile.errors import InputError

ARCHIVE = "cifar-100-binary.tar.gz"
FOLDER = "cifar-100-binary"
IMAGES = ("train.bin", "test.bin")
COARSE, FINE = "coarse_label_names.txt", "fine_label_names.txt"
PIXELS = 3 * 32 * 32
RECORD = 2 + PIXELS
MAX_RECORDS = 100_000


def is_cifar(root: Path) -> bool:
    """Say whether `root` holds the archive, or what comes out of it; or the Python version."""
    return _home(root) is not None or _python_version(root) is not None


@contextmanager
def open_cifar(root: Path) -> Iterator[Source]:
    """Open all 60,000 images, both published parts joined: 100 classes in 20 groups.

    Raises:
        InputError: a file is missing or broken, or this is the Python version.
    """
    with ExitStack() as stack:
        records, names = _read_all(stack, root)
        coarse, fine = names[COARSE], names[FINE]
        members: dict[tuple[int, int], list[str]] = {}
        for name, table in records.items():
            labels = table.start(2)
            for pair in np.unique(labels, axis=0):
                group, label = int(pair[0]), int(pair[1])
                if group >= len(coarse) or label >= len(fine):
                    raise InputError(
                        f"{root}: {name} has a label without a name; download it again"
                    )
                places = np.flatnonzero((labels == pair).all(1))
                members.setdefault((group, label), []).extend(f"{name}/{place}" for place in places)
        if len({label for _, label in members}) < len(members):
            raise InputError(f"{root}: a class lies in two groups; download it again")

        def read(file: str) -> Image.Image:
            name, _, place = file.partition("/")
            pixels = records[name].read(int(place))[0, 2:].reshape(3, 32, 32)
            return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

        classes = {
            f"{coarse[group]}/{fine[label]}": (coarse[group], tuple(places))
            for (group, label), places in members.items()
        }
        yield Source(
            root.resolve().name,
            tuple(SourceClass(name, *classes[name]) for name in sorted(classes)),
            read,
        )


def _home(root: Path) -> Path | None:
    """Return the archive, or the folder of its files, whichever is there."""
    if (root / ARCHIVE).exists():
        return root / ARCHIVE
    return next((f for f in (root / FOLDER, root) if all((f / n).exists() for n in IMAGES)), None)


def _python_version(root: Path) -> Path | None:
    return next(iter(sorted(root.glob("cifar-100-python*"))), None)


def _read_all(stack: ExitStack, root: Path) -> tuple[dict[str, Records], dict[str, list[str]]]:
    """Return the records of both image files and the names in both lists."""
    records: dict[str, Records] = {}
    names: dict[str, list[str]] = {}
    home = _home(root)
    if home is None:
        raise InputError(
            f"{_python_version(root)}: the Python version is a pickle, which can run code when it "
            "is read; run `reptile data download cifar-fs` for the binary one"
        )
    for name, stream in _files(home):
        label = f"{home}: {name}"
        if name in IMAGES:
            copied = copy_records(label, stream, RECORD, MAX_RECORDS)
            records[name] = stack.enter_context(copied)
        elif name in (COARSE, FINE):
            names[name] = _names(label, stream)
        if len(records) + len(names) == 4:
            return records, names
    missing = next(name for name in (COARSE, FINE, *IMAGES) if name not in records | names)
    raise InputError(f"{home}: no {missing} in it; download it again")


def _files(home: Path) -> Iterator[tuple[str, Stream]]:
    """Open one after the other, out of the archive or the folder."""
    if home.is_dir():
        for name in (COARSE, FINE, *IMAGES):
            if (home / name).exists():
                with open_regular(home / name) as stream:
                    yield name, stream
        return
    with (
        reading(str(home)),
        open_regular(home) as raw,
        tarfile.open(fileobj=raw, mode="r|gz") as archive,
    ):
        for member in archive:
            if member.size > MAX_RECORDS * RECORD:
                raise InputError(f"{home}: {member.name!r} is too large for CIFAR-100")
            folder, _, name = member.name.rpartition("/")
            content = archive.extractfile(member) if member.isreg() else None
            if folder == FOLDER and content is not None:
                yield name, content


def _names(label: str, stream: Stream) -> list[str]:
    with reading(label):
        names = stream.read(2**16).decode("ascii").split()
    if not names or len(set(names)) < len(names) or any("/" in name for name in names):
        raise InputError(f"{label}: no list of different names; download it again")
    return names
