"""Images that come with their split: folders train, val and test, or lists of those names.

The layouts in which mini-ImageNet goes around. Its images are ImageNet's, which each user has to
get from there.
"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from reptile.data.dataset import Split
from reptile.data.folders import from_folder, list_folder, open_regular, read_file
from reptile.data.readers.base import Source, SourceClass
from reptile.data.readers.records import reading
from reptile.errors import InputError

NAMES: dict[str, Split] = {
    "train": "train",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}
LISTS: dict[str, Split] = {"train.csv": "train", "val.csv": "validation", "test.csv": "test"}
HEADER = ["filename", "label"]


def is_presplit(root: Path) -> bool:
    """Say whether `root` has all three lists, or three split folders and no other."""
    return _has_lists(root) or _has_split_folders(root)


@contextmanager
def open_presplit(root: Path) -> Iterator[Source]:
    """Open the images with the split that lists or folders give.

    A list's rows are a file's name and its class. The file may lie anywhere in `root`; where a name
    is there more than once, in a folder of its class's name.

    Raises:
        InputError: a class is in two splits, a list is broken, or it names a file that is missing.
    """
    yield _from_lists(root) if _has_lists(root) else _from_split_folders(root)


def _has_lists(root: Path) -> bool:
    return all((root / name).is_file() for name in LISTS)


def _has_split_folders(root: Path) -> bool:
    folders = [path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    return sorted(NAMES.get(name, "") for name in folders) == ["test", "train", "validation"]


def _from_split_folders(root: Path) -> Source:
    source = from_folder(root)
    found: dict[str, SourceClass] = {}
    published: dict[str, Split] = {}
    for c in source.classes:
        folder, _, name = c.name.partition("/")
        if not name:
            raise InputError(f"{root}: images lie in {folder} itself; put them in class folders")
        _assign(root, published, name, NAMES[folder])
        found[name] = SourceClass(name, name.rpartition("/")[0], c.files)
    return Source(source.name, tuple(found[name] for name in sorted(found)), source.read, published)


def _from_lists(root: Path) -> Source:
    places: dict[str, list[str]] = {}
    for file in list_folder(root).files:
        places.setdefault(PurePosixPath(file).name, []).append(file)
    members: dict[str, list[str]] = {}
    published: dict[str, Split] = {}
    for name, split in LISTS.items():
        for number, file, label in _rows(root / name):
            _assign(root, published, label, split)
            found = places.get(file, [])
            if len(found) > 1:
                found = [place for place in found if PurePosixPath(place).parent.name == label]
            if len(found) != 1:
                raise InputError(
                    f"{root / name}: line {number}: {len(found) or 'no'} files called {file} "
                    f"in {root}{f' in a folder {label}' if file in places else ''}; one is needed"
                )
            members.setdefault(label, []).append(found[0])
    classes = (SourceClass(name, "", tuple(sorted(members[name]))) for name in sorted(members))
    return Source(
        root.resolve().name, tuple(classes), lambda file: read_file(root / file), published
    )


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    with reading(str(path)), open_regular(path) as stream:
        lines = stream.read(2**26).decode("utf-8-sig").splitlines()
    with reading(str(path)):
        rows = csv.reader(lines)
        if next(rows, None) != HEADER:
            raise InputError(f"{path}: the first line must be {','.join(HEADER)}")
        for number, row in enumerate(rows, 2):
            if len(row) != 2 or not all(row) or not all(map(str.isprintable, row)):
                raise InputError(f"{path}: line {number} must be a file's name and its class")
            yield number, row[0], row[1]


def _assign(root: Path, published: dict[str, Split], name: str, split: Split) -> None:
    if published.setdefault(name, split) != split:
        raise InputError(
            f"{root}: class {name} is in {published[name]} and in {split}; few-shot splits "
            "share no class"
        )
