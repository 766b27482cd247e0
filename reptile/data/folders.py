"""Class folders of images, in a folder or a zip: the usual layout of images.

Files are not trusted: no link leads out, nothing is unpacked to disk, sizes are bounded.
"""

import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from reptile.data.names import can_be_shown, normal
from reptile.data.readers.base import Source, SourceClass
from reptile.errors import InputError
from reptile.images import decode

UTF8_FLAG = 0x800  # of a zip's entry
UNICODE_PATH = 0x7075  # extra field of 7-Zip, WinRAR and Info-ZIP: the name in UTF-8
UNIX, MACOS = 3, 19  # systems whose zips hold names as the file system has them
MAX_BYTES = 64 * 2**20
SUFFIXES = (".png", ".jpg", ".jpeg")
JUNK = {"__macosx", "thumbs.db", "desktop.ini", "icon\r"}  # and whatever starts with a dot


class Listing(NamedTuple):
    """What lies below a folder, as paths relative to it with forward slashes."""

    files: list[str]
    folders: list[str]


def list_folder(root: Path) -> Listing:
    """List all files and folders below `root`, except for what systems leave behind.

    Raises:
        InputError: something cannot be read, or a link leads to no file in `root` or DVC's cache.
    """

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
            if path.is_symlink() and not _may_be_followed(path, inside):
                raise InputError(
                    f"{str(path)!r}: a link may only lead to a file in {root}; put a copy there"
                )
        place = Path(base).relative_to(root)
        folders += [(place / name).as_posix() for name in folder_names]
        files += [(place / name).as_posix() for name in file_names]
    return Listing(files, folders)


def _may_be_followed(link: Path, inside: Path) -> bool:
    """Say whether a link leads to a file in the folder, or in a cache of DVC, which links to it."""
    target = Path(os.path.realpath(link))  # `resolve` fails on links in a circle
    cached = re.search(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$", target.as_posix())
    return target.is_file() and (target.is_relative_to(inside) or cached is not None)


def from_folder(root: Path) -> Source:
    """Open a folder of class folders.

    Raises:
        InputError: its layout is another, or a file is unsafe.
    """
    files, folders = list_folder(root)
    return Source(
        root.resolve().name, find_classes(root, files, folders), lambda file: read_file(root / file)
    )


def read_file(path: Path) -> Image.Image:
    """Read one image file.

    Raises:
        InputError: it is no PNG or JPEG image of 8 bits a channel, or too large.
    """
    return _read_image(str(path), lambda: open_regular(path))


def open_regular(path: Path) -> IO[bytes]:
    """Open a file to read, if it is one.

    Raises:
        InputError: it is a pipe, a device or a folder.
    """
    if not path.is_file():  # a pipe or a device would never end
        raise InputError(f"{path}: not a regular file")
    return path.open("rb")


@contextmanager
def open_zip(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Open a zip and yield it with its entries by name.

    Raises:
        InputError: it is none, or an entry's path, link, encryption or double is unsafe.
    """
    try:
        archive = zipfile.ZipFile(path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: the name {error.object!r} is marked as UTF-8 and is not; make the zip anew"
        ) from None
    except (zipfile.BadZipFile, RuntimeError, ValueError) as error:  # it lacks some features
        raise InputError(f"{path}: neither a folder nor a readable zip ({error})") from None
    with archive:
        yield archive, _safe_entries(path, archive)


@contextmanager
def from_zip(path: Path) -> Iterator[Source]:
    """Open a zip of class folders; it is read where it is, never unpacked to disk.

    Raises:
        InputError: its layout is another, or an entry is unsafe.
    """
    with open_zip(path) as (archive, entries):
        folders = {name.rpartition("/")[0] for name in entries}
        files = (name for name in entries if not name.endswith("/"))
        yield Source(
            path.stem,
            find_classes(path, files, folders - {""}),
            lambda file: _read_image(f"{path}: {file}", lambda: archive.open(entries[file])),
        )


def _safe_entries(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = _entry_name(path, entry)
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
    return entries


def _entry_name(path: Path, entry: zipfile.ZipInfo) -> str:
    """Return what an entry is called, where the zip says in which encoding that is.

    Without a flag or field that says so, names of Unix and macOS are UTF-8 if they can be. Those of
    Windows are in the code page of whoever made the zip, which nothing names.
    """
    name = entry.orig_filename  # `filename` has been tidied already
    if entry.flag_bits & UTF8_FLAG:
        return name
    written = name.encode("cp437")  # as what `zipfile` reads it
    if (unicode_path := _unicode_path(entry, written)) is not None:
        return unicode_path
    if name.isascii():
        return name
    if entry.create_system in (UNIX, MACOS):
        try:
            return written.decode("utf-8")
        except UnicodeDecodeError:
            pass
    raise InputError(
        f"{path}: the name {written!r} is in an encoding that the zip does not tell; "
        "make the zip anew with names in UTF-8, or unpack it and give the folder"
    )


def _unicode_path(entry: zipfile.ZipInfo, written: bytes) -> str | None:
    """Return the name in an entry's Unicode path field, if it has one that belongs to its name."""
    extra = entry.extra
    while len(extra) >= 4:
        field, size = struct.unpack_from("<HH", extra)
        content, extra = extra[4 : 4 + size], extra[4 + size :]
        if field == UNICODE_PATH and len(content) > 5 and content[0] == 1:
            (checksum,) = struct.unpack_from("<I", content, 1)
            if checksum == zlib.crc32(written):  # otherwise someone renamed the entry since
                try:
                    return content[5:].decode("utf-8")
                except UnicodeDecodeError:
                    return None
    return None


def _has_raw_bytes(name: str) -> bool:
    """Say whether a file's name holds bytes that are not UTF-8, as Python passes them on."""
    return any("\udc80" <= char <= "\udcff" for char in name)


def _is_junk(part: str) -> bool:
    return part.startswith(".") or part.lower() in JUNK


def find_classes(
    where: str | Path, files: Iterable[str], folders: Iterable[str]
) -> tuple[SourceClass, ...]:
    """Find the classes among names such as `wrapping/alphabet/character/image.png`.

    The folder that holds images is a class, the folders above it are its group; folders that
    enclose everything are left out.

    Raises:
        InputError: names or their layout cannot be made classes of.
    """
    images: dict[tuple[str, ...], list[str]] = {}
    others: list[tuple[str, ...]] = []
    for file in files:
        parts = tuple(file.split("/"))
        if any(map(_is_junk, parts)):
            continue
        if not can_be_shown(file):
            shown = repr(os.fsencode(file)) if _has_raw_bytes(file) else repr(file)
            raise InputError(f"{where}: {shown} has characters that cannot be shown; rename it")
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
            raise InputError(
                f"{where}: {'/'.join(parts)} is no PNG or JPEG file; convert it, or remove it"
            )
    for parts in sorted(tuple(folder.split("/")) for folder in folders):
        if not (any(map(_is_junk, parts)) or parts in ancestors or parts in images):
            raise InputError(f"{where}: no images in {'/'.join(parts)!r}; add some or remove it")

    last = max(images)  # what the first and the last share in sorted order, all share
    wrapping = sum(1 for depth in range(1, len(first)) if first[:depth] == last[:depth])
    classes: dict[str, SourceClass] = {}
    for folder, members in images.items():
        full = normal("/".join(folder[wrapping:]))
        group = full.rpartition("/")[0]
        if not all(full.split("/")):
            raise InputError(f"{where}: the folder {'/'.join(folder)!r} has no name but spaces")
        if full in classes:
            raise InputError(f"{where}: two class folders are called {full}; rename one")
        classes[full] = SourceClass(full, group, tuple(sorted(members, key=normal)))
    return tuple(classes[name] for name in sorted(classes))


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
