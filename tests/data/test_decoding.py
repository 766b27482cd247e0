"""Good pictures in odd files: what every viewer shows is read, upright where that can be told."""

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError

from reptile.errors import InputError
from reptile.images import decode

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Bytes of each of Exif's types of numbers."""


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


PHOTO = encoded(Image.fromarray(PIXELS), "JPEG")


def exif(orientation: int, tag: int, type_: int, count: int, value: bytes) -> bytes:
    """Exif of an orientation and one more entry, whose value lies behind if it is long."""
    inline = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", 8 + 2 + 24 + 4)
    entries = [
        (0x112, struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)),
        (tag, struct.pack("<HHI", tag, type_, count) + inline),
    ]
    body = b"".join(entry for _, entry in sorted(entries))
    return b"II*\0\x08\0\0\0\x02\0" + body + b"\0\0\0\0" + (value if len(value) > 4 else b"")


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(decode("x", content))


def photo(*segments: bytes) -> bytes:
    return PHOTO[:2] + b"".join(segments) + PHOTO[2:]


def chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def drawing(*chunks: bytes) -> bytes:
    content = encoded(Image.fromarray(PIXELS), "PNG")
    return content[:33] + b"".join(chunks) + content[33:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tag", [0x10E, 0x110, 0x11A, 0x11B, 0x128, 0x132, 0x213, 0x8769, 0x8825])
@pytest.mark.parametrize("type_", SIZES)
def test_no_other_entry_of_exif_spoils_a_photograph(tag: int, type_: int) -> None:
    rng = np.random.default_rng([tag, type_])
    upright = np.rot90(np.asarray(Image.open(BytesIO(PHOTO))), -1)
    for count in (0, 1, 2, 3):
        for value in (bytes(SIZES[type_] * count), b"\xff" * (SIZES[type_] * count), None):
            content = rng.bytes(SIZES[type_] * count) if value is None else value
            entry = segment(0xE1, b"Exif\0\0" + exif(6, tag, type_, count, content))
            assert np.array_equal(pixels_of(photo(entry)), upright)


def test_every_orientation_turns_as_pillow_turns_it() -> None:
    for orientation in range(10):
        content = photo(segment(0xE1, b"Exif\0\0" + exif(orientation, 0x10E, 2, 2, b"a\0")))
        with Image.open(BytesIO(content)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(pixels_of(content), expected)


ODD_PHOTOS = {
    "Exif cut off": segment(0xE1, b"Exif\0\0II*\0\x08\0\0"),
    "Exif of nothing": segment(0xE1, b"Exif\0\0"),
    "Exif that points out": segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f"),
    "Exif of noise": segment(0xE1, b"Exif\0\0" + np.random.default_rng(1).bytes(200)),
    "Photoshop's, cut": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "several pictures, cut": segment(0xE2, b"MPF\0II*\0"),
    "a profile of nothing": segment(0xE2, b"ICC_PROFILE\0"),
    "XMP of noise": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<tiff:Orientation"),
    "a comment of noise": segment(0xFE, b"\xff" * 50),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ODD_PHOTOS)
def test_broken_metadata_spoils_no_photograph(case: str) -> None:
    expected = np.asarray(Image.open(BytesIO(PHOTO)))
    assert np.array_equal(pixels_of(photo(ODD_PHOTOS[case])), expected)


def test_what_else_is_broken_leaves_the_orientation() -> None:
    entry = segment(0xE1, b"Exif\0\0" + exif(6, 0x10E, 2, 2, b"a\0"))
    content = photo(entry, ODD_PHOTOS["Photoshop's, cut"])
    with pytest.raises(UnidentifiedImageError), Image.open(BytesIO(content)):
        pass  # so that the metadata has to go
    assert decode("x", content).size == (40, 60)


ODD_DRAWINGS = {
    "eXIf of noise": chunk(b"eXIf", b"\0\x08\0\x02\x01\x12"),
    "much text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))),
    "much text in many languages": chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2 << 20))
    ),
    "Exif as text, broken": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  8\nno hex"),
    "text of an unknown compression": chunk(b"zTXt", b"Comment\0\x07abc"),
    "a large profile": chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 << 20))),
    "a profile cut off": chunk(b"iCCP", b"p"),
    "a wrong checksum of text": chunk(b"tEXt", b"a\0b", checksum=1),
    "a short resolution": chunk(b"pHYs", b"\0"),
    "a short gamma": chunk(b"gAMA", b"\0"),
    "an animation of nothing": chunk(b"acTL", b"\0"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ODD_DRAWINGS)
def test_broken_metadata_spoils_no_png(case: str) -> None:
    assert np.array_equal(pixels_of(drawing(ODD_DRAWINGS[case])), PIXELS)


def test_a_png_beside_broken_text_stays_upright_and_transparent() -> None:
    entry = chunk(b"eXIf", exif(8, 0x10E, 2, 2, b"a\0"))
    content = drawing(ODD_DRAWINGS["much text"], entry)
    assert np.array_equal(pixels_of(content), np.rot90(PIXELS))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0])
    plain = encoded(palette, "PNG", transparency=0)
    spoilt = plain[:33] + ODD_DRAWINGS["much text"] + plain[33:]
    assert np.asarray(decode("x", spoilt)).tolist() == np.asarray(decode("x", plain)).tolist()
    assert np.asarray(decode("x", spoilt)).min() == 255


def test_cmyk_is_read_as_pillow_converts_it() -> None:
    content = encoded(
        Image.fromarray(PIXELS).convert("CMYK"), "JPEG", quality=95, subsampling="4:4:4"
    )
    with Image.open(BytesIO(content)) as image:
        assert image.mode == "CMYK"
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels_of(content), expected)
    assert np.abs(expected.astype(int) - PIXELS).mean() < 10  # not inverted


def test_pixels_that_are_broken_stay_an_error_that_names_the_file() -> None:
    for content in (PHOTO[: len(PHOTO) // 2], drawing()[:-60], drawing(chunk(b"IDAT", b"x", 1))):
        with pytest.raises(InputError, match=r"photos/7: cannot be read"):
            decode("photos/7", content)


def test_any_cut_or_flipped_byte_is_an_image_or_one_clear_error() -> None:
    rng = np.random.default_rng(3)
    whole = [
        photo(*ODD_PHOTOS.values()),
        photo(segment(0xE1, b"Exif\0\0" + exif(6, 0x10E, 2, 2, b"a\0"))),
        drawing(*ODD_DRAWINGS.values()),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(300):
            content = bytearray(whole[rng.integers(len(whole))])
            for place in rng.integers(0, 700, 3):
                content[place] = rng.integers(256)
            try:
                assert decode("x", bytes(content[: rng.integers(1, len(content) + 1)])).size
            except InputError as error:
                assert str(error).startswith("x: ")
                assert "\n" not in str(error)
