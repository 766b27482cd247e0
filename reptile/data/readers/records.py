"""Streams of equal records (IDX, CIFAR's binary files), kept on disk instead of in memory.

What such a file is to hold is known before it is read, so that one that unpacks to more is refused.
The modules of the formats know what its bytes mean.
"""

import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile, gettempdir
from typing import IO, Protocol

import numpy as np

from reptile.data.dataset import UInt8Array
from reptile.errors import InputError

BLOCK = 2**20
BROKEN = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,  # zipfile: an unknown compression
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
)


class Stream(Protocol):
    """What bytes can be read from."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, none at the end."""


class Records:
    """Records of equal length, to be read by number from any thread."""

    def __init__(self, file: IO[bytes], length: int, count: int) -> None:
        self._file = file
        self._turn = threading.Lock()
        self._length = length
        self._count = count

    def __len__(self) -> int:
        return self._count

    def read(self, first: int, count: int = 1) -> UInt8Array:
        """Return so many records from number `first` on: [count, bytes]."""
        with self._turn:
            self._file.seek(first * self._length)
            content = self._file.read(count * self._length)
        return np.frombuffer(content, np.uint8).reshape(-1, self._length)

    def start(self, length: int) -> UInt8Array:
        """Return the first bytes of every record: [records, length]."""
        step = max(1, BLOCK // self._length)
        places = range(0, self._count, step)
        return np.concatenate([self.read(place, step)[:, :length] for place in places])


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Turn what decompressors raise for broken files into one clear error.

    Raises:
        InputError: instead of any of those.
        OSError: an error of the system, such as a full disk.
    """
    try:
        yield
    except InputError:
        raise
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # no fault of the file: no room, no permission
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{label}: cannot be read ({reason}); download it again") from error


@contextmanager
def copy_records(label: str, stream: Stream, length: int, most: int) -> Iterator[Records]:
    """Copy a stream to a nameless temporary file, and yield its records.

    Args:
        label: what error messages call it.
        stream: at its first record.
        length: bytes of a record.
        most: records; a stream of more is refused.

    Raises:
        InputError: it is broken, empty, too long, or ends amid a record.
    """
    with _temporary_file() as file:
        size = 0
        while block := _block(label, stream, most * length + 1 - size):
            size += len(block)
            if size > most * length:
                raise InputError(f"{label}: more than the {most * length:,} bytes it may hold")
            with _room():
                file.write(block)
        with _room():
            file.flush()
        if size == 0 or size % length:
            raise InputError(
                f"{label}: {size:,} bytes are no whole number of records of {length:,}; "
                "download it again"
            )
        yield Records(file, length, size // length)


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{gettempdir()}: cannot be written ({error.strerror}); set TMPDIR to a folder with "
            "more room"
        ) from None


def _temporary_file() -> IO[bytes]:
    try:
        return TemporaryFile(prefix="reptile-")
    except OSError as error:
        raise InputError(
            f"no folder for temporary files ({error.strerror}); set TMPDIR to one that can be "
            "written"
        ) from None


def _block(label: str, stream: Stream, most: int) -> bytes:
    with reading(label):
        return stream.read(min(BLOCK, most))
