"""Writing outputs so that a crash loses nothing: a temporary name first, then a move; and locks.

Not a place for other helpers: everything here concerns whole files or folders on disk.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from reptile.errors import InputError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` in errors of the system that name no file, such as that of a full disk.

    Raises:
        InputError: instead of those, and of those that name a temporary file of `path`.
    """
    temporary = {f".{each.name}." for each in (path, Path(os.path.realpath(path)))}
    try:
        yield
    except OSError as error:
        file = "" if error.filename is None else os.fsdecode(error.filename)
        if file and not any(name in file for name in temporary):
            raise
        raise _unwritten(path, error) from error
    except InputError as error:  # of a file in the temporary folder
        cause = error.__cause__
        if isinstance(cause, OSError) and any(name in str(error) for name in temporary):
            raise _unwritten(path, cause) from cause
        raise


def _unwritten(path: Path, error: OSError) -> InputError:
    reason = error.strerror or " ".join(str(error).split())
    return InputError(f"{path}: cannot be written ({reason})")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place when the block ends well.

    On an error the temporary folder is removed and whatever was at `path` stays as it was. What
    killed processes have left is put right first. A link stays, and the folder it leads to is
    replaced.

    Raises:
        InputError: the disk is full, `path` is a file, or it may not be written.
    """
    with writing(path):
        target = _resolved(path)
        if target.exists() and not target.is_dir():
            raise InputError(f"{path}: is a file, and a folder is to be written; move it away")
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        temporary.mkdir()
        lock = _lock_of(temporary)  # says to others that this is no leftover
        try:
            yield temporary
            _replace_directory(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError:  # what Python before 3.13 makes of it
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None


def _replace_directory(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = new.with_suffix(".old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(path: Path) -> None:
    """Remove folders that killed processes have left beside `path`, or move back what was there."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.(tmp|old)")
    left = [each for each in path.parent.iterdir() if ours.fullmatch(each.name) and each.is_dir()]
    for name in {each.stem for each in left}:
        new, old = (path.with_name(name + suffix) for suffix in (".tmp", ".old"))
        lock = _lock_of(new) if new.exists() else None
        if lock is None and new.exists():
            continue  # a process is at it
        if old.exists() and not path.exists():
            old.rename(path)
        for each in (new, old):
            shutil.rmtree(each, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a file name beside `path` that replaces it in one step when the block ends well.

    A link is replaced, not what it leads to, which may be a cache.

    Raises:
        InputError: the disk is full, or `path` may not be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder` until the block ends, or this process does.

    The system releases the lock when a process dies, so a crash leaves none behind; the file
    `.lock` in the folder stays, empty. It binds only those who call this too.

    Raises:
        InputError: another process holds the lock, or the folder may not be written.
    """
    path = folder / LOCK_FILE
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _lock(descriptor)
        except OSError as error:
            held = True
            log.warning(
                "%s: its file system has no locks (%s); see to it that no other process uses it",
                folder,
                error.strerror,
            )
        if not held:
            with os.fdopen(descriptor, encoding="utf-8") as file:
                holder = file.read(20).strip()
            raise InputError(
                f"{folder}: in use by another process{holder and f' ({holder})'}; "
                "wait until it has ended, or choose another folder"
            )
        with suppress(FileNotFoundError):  # someone removed the folder between the two calls
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with suppress(OSError):  # a full disk: the number is for people alone
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        with suppress(OSError):
            os.ftruncate(descriptor, 0)  # outputs have the same bytes whichever process made them
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> bool:
        try:
            os.lseek(descriptor, 2**30, os.SEEK_SET)  # a byte that nobody reads
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _lock(descriptor: int) -> bool:
        """Lock an open file or folder; say whether no other process has."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _lock_of(folder: Path) -> int | None:
    """Lock a folder and return what to close then; None if another process has, or none can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    with suppress(OSError):
        if _lock(descriptor):
            return descriptor
    os.close(descriptor)
    return None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as strict JSON (NaN and infinities are refused) in one step."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
