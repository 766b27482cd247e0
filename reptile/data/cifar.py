"""CIFAR-100 in its binary version: records of two labels and 32×32 pixels in colour.

The Python version is refused: it is a pickle, which can run code when it is read. Which classes are
held out (CIFAR-FS, FC100) is `held_out`'s business.
"""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from reptile.data.folders import open_regular
from reptile.data.prepared import UInt8Array
from reptile.data.records import map_stream, reading
from reptile.data.source import Source, SourceClass
from reptile.errors import InputError

ARCHIVE = "cifar-100-binary.tar.gz"
FOLDER = "cifar-100-binary"
IMAGES = ("train.bin", "test.bin")
COARSE, FINE = "coarse_label_names.txt", "fine_label_names.txt"
PIXELS = 3 * 32 * 32
RECORD = 2 + PIXELS
MAX_BYTES = 100_000 * RECORD


def is_cifar(root: Path) -> bool:
    """Say whether `root` holds the archive, or what comes out of it; or the Python version."""
    return _home(root) is not None or _python_version(root) is not None


@contextmanager
def open_cifar(root: Path) -> Iterator[Source]:
    """Open all 60,000 images, both published parts joined: 100 classes in 20 groups.

    Raises:
        InputError: a file is missing or broken, or this is the Python version.
    """
    files = _files(root)
    coarse, fine = (_names(root, name, files[name]) for name in (COARSE, FINE))
    records = {name: _records(root, name, files[name]) for name in IMAGES}
    members: dict[tuple[int, int], list[str]] = {}
    for name, table in records.items():
        for pair in np.unique(table[:, :2], axis=0):
            group, label = int(pair[0]), int(pair[1])
            if group >= len(coarse) or label >= len(fine):
                raise InputError(f"{root}: {name} has a label without a name; download it again")
            places = np.flatnonzero((table[:, :2] == pair).all(1))
            members.setdefault((group, label), []).extend(f"{name}/{place}" for place in places)
    if len({label for _, label in members}) < len(members):
        raise InputError(f"{root}: a class lies in two groups; download it again")

    def read(file: str) -> Image.Image:
        name, _, place = file.partition("/")
        pixels = records[name][int(place), 2:].reshape(3, 32, 32)
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


def _files(root: Path) -> dict[str, UInt8Array]:
    """Map the four files that are needed, out of the archive or the folder."""
    home = _home(root)
    if home is None:
        raise InputError(
            f"{_python_version(root)}: the Python version is a pickle, which can run code when it "
            "is read; run `reptile data download cifar-fs` for the binary one"
        )
    wanted = (COARSE, FINE, *IMAGES)
    found: dict[str, UInt8Array] = {}
    with reading(str(home)):
        if home.is_dir():
            for name in wanted:
                with open_regular(home / name) as stream:
                    found[name] = map_stream(str(home / name), stream, MAX_BYTES)
        else:
            with open_regular(home) as raw, tarfile.open(fileobj=raw, mode="r|gz") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    content = archive.extractfile(member) if member.isreg() else None
                    if folder == FOLDER and name in wanted and content is not None:
                        found[name] = map_stream(f"{home}: {name}", content, MAX_BYTES)
                    if len(found) == len(wanted):
                        break
    if missing := [name for name in wanted if name not in found]:
        raise InputError(f"{home}: no {missing[0]} in it; download it again")
    return found


def _names(root: Path, file: str, content: UInt8Array) -> list[str]:
    with reading(f"{root}: {file}"):
        names = content.tobytes()[: 2**16].decode("ascii").split()
    if len(set(names)) < len(names) or any("/" in name for name in names):
        raise InputError(f"{root}: {file}: no list of different names; download it again")
    return names


def _records(root: Path, file: str, content: UInt8Array) -> UInt8Array:
    if len(content) % RECORD:
        raise InputError(
            f"{root}: {file}: {len(content):,} bytes are no whole number of records of {RECORD:,}; "
            "download it again"
        )
    return content.reshape(-1, RECORD)
