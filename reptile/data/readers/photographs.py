"""The photographs that install with scikit-image; crops of one of them are a class.

They set the strength and scale of a head on a frozen network where there are no classes of
photographs to set them on. The crops are so small that telling them apart is as hard as telling
classes of photographs apart, else the head would be too sure of itself. What is measured on them
says nothing of such classes.
"""

import numpy as np

from reptile.data.dataset import UInt8Array
from reptile.errors import InputError

NAMES = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "cell",
    "clock",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "page",
    "retina",
    "rocket",
    "text",
)
"""What the package holds itself, without a download."""
CROPS = 20
SIDES = (0.06, 0.2)  # of a crop, as parts of the photograph's shorter side


def photograph_crops() -> dict[str, UInt8Array]:
    """Return the crops, RGB [H, W, 3], by name: cat/00.png and so on; always the same.

    Raises:
        InputError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError:
        raise InputError(
            "photographs: scikit-image is not installed: pip install 'reptile-fewshot[photos]'"
        ) from None
    rng = np.random.default_rng(0)
    crops: dict[str, UInt8Array] = {}
    for name in NAMES:
        pixels: UInt8Array = np.asarray(getattr(data, name)())
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=-1)
        height, width, _ = pixels.shape
        for number in range(CROPS):
            side = int(min(height, width) * rng.uniform(*SIDES))
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            crop = pixels[top : top + side, left : left + side]
            crops[f"{name}/{number:02}.png"] = np.ascontiguousarray(crop)
    return crops
