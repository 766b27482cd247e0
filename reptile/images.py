"""Image files as pixels, for training data and for consumers of a bundle alike.

What is given is not trusted. Pillow and numpy only, so that a server needs no more.
"""

from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from reptile.errors import InputError

MAX_PIXELS = 50_000_000
_MODES = {
    "1": "L",
    "L": "L",
    "LA": "L",
    "P": "RGB",
    "RGB": "RGB",
    "RGBA": "RGB",
    "CMYK": "RGB",
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its orientation in Exif."""
_PNG = b"\x89PNG\r\n\x1a\n"


def decode(label: str, content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a PNG or JPEG file: upright, of mode "L" or "RGB", transparent pixels as white paper.

    Broken metadata spoils no image: what cannot be read of it is left out.

    Args:
        label: what error messages call it.
        content: the file's bytes.
        max_pixels: a larger image is refused before its pixels are unpacked.

    Raises:
        InputError: not such a file, too large, or not of 8-bit grey, RGB or CMYK pixels.
    """
    try:
        return _decode(label, content, max_pixels)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{label}: more pixels than {max_pixels:,}, the maximum") from None
    except Exception:  # Pillow documents no closed set for broken files
        pass
    try:
        return _decode(label, _without_metadata(content), max_pixels)
    except InputError:
        raise
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)  # whose text is of an object in memory
        reason = (
            "it is neither" if unknown else " ".join(str(error).split()) or type(error).__name__
        )
        raise InputError(f"{label}: cannot be read as a PNG or JPEG image ({reason})") from error


def _decode(label: str, content: bytes, max_pixels: int) -> Image.Image:
    with Image.open(BytesIO(content), formats=("PNG", "JPEG")) as image:
        if image.width * image.height > max_pixels:
            raise InputError(
                f"{label}: {image.width} x {image.height} pixels; at most {max_pixels:,}"
            )
        if image.mode not in _MODES:
            raise InputError(f"{label}: pixels of type {image.mode}; save it as 8-bit grey or RGB")
        image.load()
        return _on_paper(_upright(image), _MODES[image.mode])


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image by its orientation, where that can be read.

    Not by Pillow's `exif_transpose`, which writes all of Exif anew and fails on odd values.
    """
    try:
        turn = _UPRIGHT.get(image.getexif()[ExifTags.Base.Orientation])
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def _without_metadata(content: bytes) -> bytes:
    """Return a PNG or JPEG file without what viewers ignore, but with its Exif."""
    kept = []
    if content.startswith(_PNG):
        kept, place = [_PNG], len(_PNG)
        while place < len(content):
            end = place + 12 + int.from_bytes(content[place : place + 4])
            name = content[place + 4 : place + 8]
            if name[:1].isupper() or name in (b"tRNS", b"eXIf"):  # upper case: critical
                kept.append(content[place:end])
            place = end
        return b"".join(kept)
    kept, place = [content[:2]], 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
        marker = content[place + 1 : place + 2]
        if marker == b"\xff":  # padding
            place += 1
            continue
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4])
        exif = content.startswith(b"\xff\xe1", place) and content.startswith(b"Exif", place + 4)
        application = b"\xe1" <= marker <= b"\xef" and marker != b"\xee"  # Adobe's says the colours
        if exif or not (application or marker == b"\xfe"):
            kept.append(content[place:end])
        place = end
    return b"".join([*kept, content[place:]])


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
