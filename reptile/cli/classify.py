"""Folders and files of images for a bundle: input and output of `reptile classify`.

For training data see `data`. Needs no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reptile.data.readers.open import open_source
from reptile.errors import InputError
from reptile.images import decode, fit
from reptile.runtime import AdaptedModel, FewShotModel, Prediction

UInt8Array = npt.NDArray[np.uint8]

MAX_BYTES = 64 * 2**20  # of one image file, as in training data


def read_support(folder: Path, model: FewShotModel) -> tuple[UInt8Array, list[str]]:
    """Read a support set: a folder or zip with a folder for each class, laid out as for training.

    Returns:
        Images [N, C, H, W] fitted to the bundle, and the name of each one's class.

    Raises:
        InputError: no such folder, another layout, more classes or images than the bundle takes,
            or a file that is no image.
    """
    if not folder.exists():
        raise InputError(
            f"{folder}: no such support set; give a folder that has a folder of images per class"
        )
    with open_source(str(folder.absolute())) as source:  # whole, as `digits` alone is a dataset
        names = [c.name for c in source.classes]
        if not 2 <= len(names) <= model.ways:
            listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise InputError(
                f"{folder}: classes: {len(names)} ({listed}); this bundle takes 2 to "
                f"{model.ways}: add or remove class folders"
            )
        files = [(file, c.name) for c in source.classes for file in c.files]
        if len(files) > model.bundle.max_support:
            raise InputError(
                f"{folder}: {len(files)} images; this bundle adapts to at most "
                f"{model.bundle.max_support}: remove some"
            )
        images = [fit(source.read(file), model.pixel_shape) for file, _ in files]
    return np.stack(images), [name for _, name in files]


def read_images(paths: Sequence[Path], shape: tuple[int, int, int]) -> UInt8Array:
    """Read PNG or JPEG files, fitted to (C, H, W) as images are for training; [N, C, H, W].

    Raises:
        InputError: a file that is missing, too large or no such image.
    """
    images = np.empty((len(paths), *shape), dtype=np.uint8)
    for image, path in zip(images, paths, strict=True):
        image[:] = fit(decode(str(path), _content(path)), shape)
    return images


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: a folder; give the PNG or JPEG files in it")
    if not path.is_file():  # a pipe or a device would never end
        raise InputError(f"{path}: no such file, or not a regular one; give PNG or JPEG files")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: more than {MAX_BYTES // 2**20} MiB; too large an image")
    return content


def report(paths: Sequence[Path], adapted: AdaptedModel, prediction: Prediction) -> dict[str, Any]:
    """Return the adaptation and the predictions, for JSON."""
    return {
        "labels": adapted.labels,
        "losses": adapted.losses.tolist(),
        "predictions": [
            {
                "image": str(path),
                "label": label,
                "probabilities": dict(zip(adapted.labels, row.tolist(), strict=True)),
            }
            for path, label, row in zip(paths, *prediction, strict=True)
        ],
    }
