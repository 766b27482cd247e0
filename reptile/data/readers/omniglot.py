"""Omniglot as it is published: two zips of alphabets, or the folders that come out of them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from PIL import Image

from reptile.data.folders import from_folder, from_zip
from reptile.data.readers.base import Source, SourceClass
from reptile.errors import InputError

PARTS = ("images_background", "images_evaluation")
TORCHVISION_FOLDER = "omniglot-py"


def is_omniglot(root: Path) -> bool:
    """Say whether `root` holds one of the zips, or both folders."""
    home = _home(root)
    zips, folders = ([(home / (part + end)).exists() for part in PARTS] for end in (".zip", ""))
    return any(zips) or all(folders)


@contextmanager
def open_omniglot(root: Path) -> Iterator[Source]:
    """Open both parts as one source, its groups being the alphabets of both.

    Args:
        root: what holds the zips or folders, itself or in the folder that torchvision makes.

    Raises:
        InputError: a part is missing, or is no folder or zip of `alphabet/character/image.png`.
    """
    with ExitStack() as stack:
        parts: dict[str, Source] = {}
        for part in PARTS:
            path = _home(root) / part
            zipped = path.with_suffix(".zip")
            if zipped.exists():
                parts[part] = stack.enter_context(from_zip(zipped))
            elif path.is_dir():
                parts[part] = from_folder(path)
            else:
                raise InputError(
                    f"{zipped}: no such file, and the whole of Omniglot needs it; "
                    "run `reptile data download omniglot`, or give one zip alone as the source"
                )

        def read(file: str) -> Image.Image:
            part, _, rest = file.partition("/")
            return parts[part].read(rest)

        yield Source(root.resolve().name, _merge(root, parts), read)


def _home(root: Path) -> Path:
    inner = root / TORCHVISION_FOLDER
    return inner if inner.is_dir() else root


def _merge(root: Path, parts: dict[str, Source]) -> tuple[SourceClass, ...]:
    merged: dict[str, SourceClass] = {}
    for part, source in parts.items():
        for c in source.classes:
            if c.name in merged:
                raise InputError(f"{root}: both parts have {c.name}; keep each as it is published")
            files = tuple(f"{part}/{file}" for file in c.files)
            merged[c.name] = SourceClass(c.name, c.group, files)
    return tuple(merged[name] for name in sorted(merged))
