"""Where images come from: a folder or zip of class folders, or one of two built-in datasets.

A source lists its classes at once and reads images one by one, so that it may be larger than
memory. What it is given is not trusted. Splitting and resizing belong to `prepare`.
"""

import os
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from reptile.data.glyphs import draw_glyphs, glyph_name
from reptile.errors import InputError
from reptile.images import decode

MAX_BYTES = 64 * 2**20
SUFFIXES = (".png", ".jpg", ".jpeg")
JUNK = {"__macosx", "thumbs.db", "desktop.ini", "icon\r"}  # and whatever starts with a dot


@dataclass(frozen=True)
class SourceClass:
    """One class: its name with its group's (`alphabet01/character03`), and its files in order."""

    name: str
    group: str  # "" where classes are not grouped
    files: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Classes in the order of their names, and how to read one of their files.

    `read` returns an upright image of mode "L" or "RGB" and may be called from any thread.
    """

    name: str
    classes: tuple[SourceClass, ...]
    read: Callable[[str], Image.Image]


@contextmanager
def open_source(source: str) -> Iterator[Source]:
    """Open `glyphs`, `digits`, or the path of a folder or zip of class folders.

    The folder that holds images is a class, the folders above it are its group; folders that
    enclose everything are left out. Transparent pixels become white paper; a palette counts as
    colour.

    Raises:
        InputError: there is no such source, its layout is none of these, or a file is unsafe.
            `read` raises it for a file that is no PNG or JPEG image of 8 bits a channel.
    """
    path = Path(source)
    if source == "glyphs":
        glyphs = draw_glyphs()
        places = np.ndindex(glyphs.shape[:3])
        yield _from_arrays(source, {glyph_name(*place): glyphs[place] for place in places})
    elif source == "digits":
        yield _from_arrays(source, _digits())
    elif path.is_dir():
        yield _from_folder(path)
    elif path.is_file():
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise InputError(f"{path}: neither a folder nor a readable zip ({error})") from None
        with archive:
            yield _from_zip(path, archive)
    else:
        raise InputError(
            f"{source}: no such source; give a folder or a zip of class folders, "
            "or the name `glyphs` or `digits`"
        )


def _from_arrays(name: str, images: Mapping[str, npt.NDArray[np.uint8]]) -> Source:
    return Source(name, _classes(name, images, ()), lambda file: Image.fromarray(images[file]))


def _digits() -> dict[str, npt.NDArray[np.uint8]]:
    """Real handwritten digits, 8×8, made dark on white like the other sources."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    pixels = np.rint(255 - digits.images * (255 / 16)).astype(np.uint8)
    return {
        f"{label}/{number:04}.png": image
        for number, (label, image) in enumerate(zip(digits.target, pixels, strict=True))
    }


def _from_folder(root: Path) -> Source:
    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})")

    files: list[str] = []
    folders: list[str] = []
    inside = root.resolve()
    for base, folder_names, file_names in os.walk(root, onerror=unreadable):
        folder_names[:] = [name for name in folder_names if not _is_junk(name)]
        file_names = [name for name in file_names if not _is_junk(name)]
        for name in (*folder_names, *file_names):
            path = Path(base, name)
            if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(inside)):
                raise InputError(
                    f"{str(path)!r}: a link may only lead to a file in {root}; put a copy there"
                )
        place = Path(base).relative_to(root)
        folders += [(place / name).as_posix() for name in folder_names]
        files += [(place / name).as_posix() for name in file_names]
    return Source(
        root.resolve().name,
        _classes(root, files, folders),
        lambda file: _read_image(f"{root / file}", lambda: _open_regular(root / file)),
    )


def _open_regular(path: Path) -> IO[bytes]:
    if not path.is_file():  # a pipe or a device would never end
        raise InputError(f"{path}: not a regular file")
    return path.open("rb")


def _from_zip(path: Path, archive: zipfile.ZipFile) -> Source:
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.orig_filename  # `filename` has been tidied already
        parts = name.removesuffix("/").split("/")
        if "\\" in name or "\0" in name or {"", ".", ".."} & set(parts):
            problem = "an unsafe path"
        elif stat.S_ISLNK(entry.external_attr >> 16):
            problem = "a symbolic link"
        elif entry.flag_bits & 1:
            problem = "encrypted"
        elif name in entries:
            problem = "there twice"
        else:
            entries[name] = entry
            continue
        raise InputError(f"{path}: {name!r} is {problem}; make the zip anew from plain files")
    folders = {name.rpartition("/")[0] for name in entries}
    return Source(
        path.stem,
        _classes(path, (name for name in entries if not name.endswith("/")), folders - {""}),
        lambda file: _read_image(f"{path}: {file}", lambda: archive.open(entries[file])),
    )


def _is_junk(part: str) -> bool:
    return part.startswith(".") or part.lower() in JUNK


def _classes(
    where: str | Path, files: Iterable[str], folders: Iterable[str]
) -> tuple[SourceClass, ...]:
    """Find the classes among names such as `wrapping/alphabet/character/image.png`."""
    images: dict[tuple[str, ...], list[str]] = {}
    others: list[tuple[str, ...]] = []
    for file in files:
        parts = tuple(file.split("/"))
        if any(map(_is_junk, parts)):
            continue
        if not file.isprintable():
            raise InputError(f"{where}: {file!r} has characters that cannot be shown; rename it")
        if file.lower().endswith(SUFFIXES):
            images.setdefault(parts[:-1], []).append(file)
        else:
            others.append(parts)
    expected = "expected class/image.png or group/class/image.png"
    if not images:
        raise InputError(f"{where}: no PNG or JPEG images; {expected}")
    if () in images:
        raise InputError(f"{where}: {images[()][0]} lies in no class folder; {expected}")
    first = min(images)
    for folder in sorted(images):
        if len(folder) != len(first):
            raise InputError(
                f"{where}: images in {'/'.join(first)} and in {'/'.join(folder)}; "
                "class folders must all lie equally deep"
            )
    ancestors = {folder[:depth] for folder in images for depth in range(len(folder))}
    for parts in sorted(others):
        if parts[:-1] not in ancestors:  # a README above the classes does no harm
            raise InputError(f"{where}: {'/'.join(parts)} is no PNG or JPEG file; remove it")
    for parts in sorted(tuple(folder.split("/")) for folder in folders):
        if not (any(map(_is_junk, parts)) or parts in ancestors or parts in images):
            raise InputError(f"{where}: no images in {'/'.join(parts)!r}; add some or remove it")

    last = max(images)  # what the first and the last share in sorted order, all share
    wrapping = sum(1 for depth in range(1, len(first)) if first[:depth] == last[:depth])
    found: dict[str, SourceClass] = {}
    for folder, members in images.items():
        # Unicode has two ways to write é, and file systems differ in which they give back.
        *group, name = unicodedata.normalize("NFC", "/".join(folder[wrapping:])).split("/")
        full = "/".join([*group, name])
        if full in found:
            raise InputError(f"{where}: two class folders are called {full}; rename one")
        found[full] = SourceClass(full, "/".join(group), tuple(sorted(members)))
    return tuple(found[name] for name in sorted(found))


def _read_image(label: str, opened: Callable[[], IO[bytes]]) -> Image.Image:
    try:
        with opened() as file:
            content = file.read(MAX_BYTES + 1)  # whatever size the file claims to have
    except InputError:
        raise
    except Exception as error:  # zipfile documents no closed set for broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{label}: cannot be read ({reason})") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"{label}: more than {MAX_BYTES // 2**20} MiB; too large an image")
    return decode(label, content)
