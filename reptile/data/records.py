"""Streams of plain records (IDX, CIFAR's binary files), mapped instead of loaded.

What such a file is to hold is known before it is read, so that one that unpacks to more is refused.
What its bytes mean is the formats' business.
"""

import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Protocol

import numpy as np

from reptile.data.prepared import UInt8Array
from reptile.errors import InputError

BLOCK = 2**20
BROKEN = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, tarfile.TarError)


class Stream(Protocol):
    """What bytes can be read from."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, none at the end."""


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Turn what decompressors raise for broken files into one clear error.

    Raises:
        InputError: instead of any of those.
    """
    try:
        yield
    except InputError:
        raise
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{label}: cannot be read ({reason}); download it again") from error


def map_stream(label: str, stream: Stream, most: int) -> UInt8Array:
    """Copy a stream to a nameless temporary file and map it read-only: [bytes].

    So a large file costs disk while it is in use, and pages that the system can take back.

    Raises:
        InputError: it is broken, empty, or longer than `most` bytes.
    """
    with reading(label), TemporaryFile(prefix="reptile-") as file:
        size = 0
        while block := stream.read(min(BLOCK, most + 1 - size)):
            size += len(block)
            if size > most:
                raise InputError(f"{label}: more than the {most:,} bytes it may hold")
            file.write(block)
        if size == 0:
            raise InputError(f"{label}: empty; download it again")
        file.flush()
        return np.memmap(file, np.uint8, "r")
