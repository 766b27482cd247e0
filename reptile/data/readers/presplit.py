"""Images that come with their split: folders train, val and test, or lists of those names.

The layouts in which mini-ImageNet is passed on; its images are ImageNet's, which each user has to
get from there. Folders of training and test images are recognised here in any source.
"""

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from reptile.data.dataset import Split
from reptile.data.folders import list_folder, open_regular, read_file
from reptile.data.names import can_be_shown, normal, refuse_two_spellings
from reptile.data.readers.base import Source, SourceClass
from reptile.data.readers.records import reading
from reptile.errors import InputError

WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
LISTS: dict[str, Split] = {"train.csv": "train", "val.csv": "validation", "test.csv": "test"}
HEADER = ["filename", "label"]


def has_lists(root: Path) -> bool:
    """Say whether `root` has all three lists."""
    return all((root / name).is_file() for name in LISTS)


@contextmanager
def open_lists(root: Path) -> Iterator[Source]:
    """Open the images with the split that lists give.

    A list's rows are a file's name and its class. The file may lie anywhere in `root`; where a name
    is there more than once, in a folder of its class's name.

    Raises:
        InputError: a class is in two splits, a list is broken, or it names a file that is missing.
    """
    yield _from_lists(root)


def split_folders(source: Source) -> Source:
    """Take a source's outermost folders for its split, if train, val, test or the like is in each.

    Then the same class in two of them is one class, with the images of both; such a source has no
    published split for few-shot learning, but its classes can be held out like any others.

    Raises:
        InputError: some folders are called so and others are not, or they lie further in.
    """
    paths = [c.name.split("/") for c in source.classes]
    names = [set(level) for level in zip(*paths, strict=True)]  # all classes lie equally deep
    if len(names) > 1 and (splits := _split_of_each(names[0])):
        return _merged(source, splits)
    for level, of_level in enumerate(names):
        words = sorted(name for name in of_level if name.casefold() in WORDS)
        here = {WORDS[word.casefold()] for word in words}
        innermost = level == len(names) - 1
        whole = len(words) == len(of_level)
        if len(here) > 1 and (whole or not innermost):
            where = "hold images themselves" if len(names) == 1 else "are no outermost folders"
            if not whole:
                others = ", ".join(sorted(of_level - set(words))[:3])
                where = f"lie beside others ({others})"
            raise InputError(
                f"{source.name}: folders {', '.join(words)} look like a split and {where}; lay the "
                "images out as split/class/image.png, or as class/image.png without a split"
            )
    _refuse_unknown_split(source, names)
    return source


def _split_of_each(folders: set[str]) -> dict[str, Split]:
    """Return each folder's split if all have one and there are several, or nothing.

    A word of it is enough, as in `seg_train` or `val2017`.
    """
    splits = {}
    for folder in folders:
        words = re.findall("[a-z]+", folder.casefold())
        of_folder = {WORDS[word] for word in words if word in WORDS}
        if len(of_folder) != 1:
            return {}
        (splits[folder],) = of_folder
    return splits if len(set(splits.values())) > 1 else {}


def _refuse_unknown_split(source: Source, names: list[set[str]]) -> None:
    """Refuse folders such as `train` and `holdout` that share classes."""
    if len(names) < 2:
        return
    inner = _by_folder(source)
    for folder in sorted(inner):
        for other in sorted(inner.keys() - {folder}):
            named = WORDS.get(folder.casefold()) in ("train", "test")  # `dev` may be a language
            if named and (shared := inner[folder] & inner[other]):
                raise InputError(
                    f"{source.name}: {folder} looks like a part of a split, and {other} has its "
                    f"class {min(shared)} too; call the folders train, val and test, or join them"
                )


def _by_folder(source: Source) -> dict[str, set[str]]:
    """Return the names of the classes in each of the outermost folders."""
    inner: dict[str, set[str]] = {}
    for c in source.classes:
        folder, _, name = c.name.partition("/")
        inner.setdefault(folder, set()).add(name)
    return inner


def _merged(source: Source, splits: dict[str, Split]) -> Source:
    """Join classes of one name in several split folders."""
    refuse_two_spellings(f"{source.name}: split folders", _by_folder(source).values())
    members: dict[str, tuple[str, ...]] = {}
    published: dict[str, Split] = {}
    no_split = source.no_split
    for c in source.classes:
        folder, _, name = c.name.partition("/")
        members[name] = members.get(name, ()) + c.files
        if (other := published.setdefault(name, splits[folder])) != splits[folder]:
            no_split = (
                f"class {name} is in {other} and in {splits[folder]}, and few-shot splits share no "
                "class"
            )
    return replace(
        source,
        classes=tuple(
            SourceClass(name, name.rpartition("/")[0], members[name]) for name in sorted(members)
        ),
        published=published if no_split == source.no_split else {},
        no_split=no_split,
    )


def _from_lists(root: Path) -> Source:
    places: dict[str, list[str]] = {}
    for file in list_folder(root).files:
        places.setdefault(normal(PurePosixPath(file).name), []).append(file)
    members: dict[str, list[str]] = {}
    published: dict[str, Split] = {}
    listed: dict[str, str] = {}
    for name, split in LISTS.items():
        for number, file, label in _rows(root / name):
            _assign(root, published, label, split)
            matches = places.get(file, [])
            if len(matches) > 1:
                matches = [
                    place for place in matches if normal(PurePosixPath(place).parent.name) == label
                ]
            if len(matches) != 1:
                raise InputError(
                    f"{root / name}: line {number}: {len(matches) or 'no'} files called {file} "
                    f"in {root}{f' in a folder {label}' if file in places else ''}; one is needed"
                )
            here = f"{name}, line {number}"
            if (before := listed.setdefault(matches[0], here)) != here:
                raise InputError(
                    f"{root}: {matches[0]} is listed twice ({before}; {here}), and would be an "
                    "example and its own test; remove one"
                )
            members.setdefault(label, []).append(matches[0])
    refuse_two_spellings(
        f"{root}: lists",
        [[name for name in published if published[name] == split] for split in LISTS.values()],
    )
    classes = (SourceClass(name, "", tuple(sorted(members[name]))) for name in sorted(members))
    return Source(
        root.resolve().name, tuple(classes), lambda file: read_file(root / file), published
    )


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    with reading(str(path)), open_regular(path) as stream:
        lines = stream.read(2**26).decode("utf-8-sig").splitlines()
    with reading(str(path)):
        rows = ([normal(cell) for cell in row] for row in csv.reader(lines))
        if next(rows, None) != HEADER:
            raise InputError(f"{path}: the first line must be {','.join(HEADER)}")
        for number, row in enumerate(rows, 2):
            if len(row) != 2 or not all(row) or not all(map(can_be_shown, row)):
                raise InputError(f"{path}: line {number} must be a file's name and its class")
            yield number, row[0], row[1]


def _assign(root: Path, published: dict[str, Split], name: str, split: Split) -> None:
    if published.setdefault(name, split) != split:
        raise InputError(
            f"{root}: class {name} is in {published[name]} and in {split}; few-shot splits "
            "share no class"
        )
