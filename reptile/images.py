"""Image files as pixels, for training data and for consumers of a bundle alike.

What is given is not trusted. Pillow and numpy only, so that a server needs no more.
"""

from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from reptile.errors import InputError

MAX_PIXELS = 50_000_000
_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB"}


def decode(label: str, content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a PNG or JPEG file: upright, of mode "L" or "RGB", transparent pixels as white paper.

    Args:
        label: what error messages call it.
        content: the file's bytes.
        max_pixels: a larger image is refused before its pixels are unpacked.

    Raises:
        InputError: not such a file, too large, or not of 8-bit grey or RGB pixels.
    """
    try:
        with Image.open(BytesIO(content), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > max_pixels:
                raise InputError(
                    f"{label}: {image.width} x {image.height} pixels; at most {max_pixels:,}"
                )
            if image.mode not in _MODES:
                raise InputError(
                    f"{label}: pixels of type {image.mode}; save it as 8-bit grey or RGB"
                )
            return _on_paper(ImageOps.exif_transpose(image), _MODES[image.mode])
    except InputError:
        raise
    except Exception as error:  # Pillow documents no closed set for broken files
        unknown = isinstance(error, UnidentifiedImageError)  # whose text is of an object in memory
        reason = (
            "it is neither" if unknown else " ".join(str(error).split()) or type(error).__name__
        )
        raise InputError(f"{label}: cannot be read as a PNG or JPEG image ({reason})") from error


def fit(image: Image.Image, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Stretch an image to (C, H, W), grey where C is 1; return uint8 [C, H, W]."""
    channels, height, width = shape
    # Lanczos averages over all pixels it drops, so that strokes thinner than the step (a pen of 2
    # to 3 pixels in Omniglot's 105) stay whole and dark, and it enlarges smoothly too.
    small = image.convert("L" if channels == 1 else "RGB").resize(
        (width, height), Image.Resampling.LANCZOS
    )
    return np.asarray(small).reshape(height, width, channels).transpose(2, 0, 1)


def _on_paper(image: Image.Image, mode: str) -> Image.Image:
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert(mode)
