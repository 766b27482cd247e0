"""The format of a source, from its name or path, and the sources that need no files.

The format is recognised by the files at the path, so that a source stays a path, on which DVC can
depend.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

from reptile.data.dataset import UInt8Array
from reptile.data.folders import find_classes, from_folder, from_zip
from reptile.data.readers.base import Source
from reptile.data.readers.cifar import is_cifar, open_cifar
from reptile.data.readers.glyphs import draw_glyphs, glyph_name
from reptile.data.readers.idx import is_idx, open_idx
from reptile.data.readers.omniglot import is_omniglot, open_omniglot
from reptile.data.readers.photographs import photograph_crops
from reptile.data.readers.presplit import has_lists, open_lists, split_folders
from reptile.errors import InputError

Opener = Callable[[Path], AbstractContextManager[Source]]

FORMATS: tuple[tuple[Callable[[Path], bool], Opener], ...] = (
    (is_omniglot, open_omniglot),
    (is_idx, open_idx),
    (is_cifar, open_cifar),
    (has_lists, open_lists),
)
"""The formats of folders other than class folders: how to recognise each, and how to open it."""


@contextmanager
def open_source(source: str) -> Iterator[Source]:
    """Open `glyphs`, `digits`, `photographs`, or the path of a folder or zip of images.

    A folder may hold the published files of Omniglot, MNIST, EMNIST or CIFAR-100, images with split
    lists or split folders, or class folders. A zip holds class folders. Transparent pixels become
    white paper; a palette counts as colour.

    Raises:
        InputError: there is no such source, its layout is none of these, or a file is unsafe.
            `read` raises it for a file that is no PNG or JPEG image of 8 bits a channel.
    """
    with _opened(source) as opened:
        yield opened


def _opened(source: str) -> AbstractContextManager[Source]:
    path = Path(source)
    if source == "glyphs":
        glyphs = draw_glyphs()
        places = np.ndindex(glyphs.shape[:3])
        return _from_arrays(source, {glyph_name(*place): glyphs[place] for place in places})
    if source == "digits":
        return _from_arrays(source, _digits())
    if source == "photographs":
        return _from_arrays(source, photograph_crops())
    if path.is_dir():
        for is_format, open_format in FORMATS:
            if is_format(path):
                return open_format(path)
        return nullcontext(split_folders(from_folder(path)))
    if path.is_file():
        return _zipped(path)
    raise InputError(
        f"{source}: no such source; give a folder or a zip of class folders, the folder of a "
        "downloaded dataset, or the name `glyphs`, `digits` or `photographs`"
    )


@contextmanager
def _zipped(path: Path) -> Iterator[Source]:
    with from_zip(path) as source:
        yield split_folders(source)


def _from_arrays(name: str, images: Mapping[str, UInt8Array]) -> AbstractContextManager[Source]:
    classes = find_classes(name, images, ())
    return nullcontext(Source(name, classes, lambda file: Image.fromarray(images[file])))


def _digits() -> dict[str, UInt8Array]:
    """Real handwritten digits, 8×8, made dark on white like the other sources."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    pixels = np.rint(255 - digits.images * (255 / 16)).astype(np.uint8)
    return {
        f"{label}/{number:04}.png": image
        for number, (label, image) in enumerate(zip(digits.target, pixels, strict=True))
    }
