"""Image files as a stranger may send them: bombs, damage, other formats, odd modes."""

import gzip
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"


def png(size: int = 28, seed: int = 0, mode: str = "L") -> bytes:
    """A well-formed PNG of random blocks."""
    rng = random.Random(seed)
    small = Image.new("L", (4, 4))
    small.putdata([rng.choice((0, 255)) for _ in range(16)])
    return encoded(small.resize((size, size)).convert(mode), "PNG")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def chunk(kind: bytes, data: bytes, *, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def header(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def zeros(size: int) -> bytes:
    """Deflate that many zero bytes without holding them."""
    packer, block = zlib.compressobj(6), bytes(1 << 20)
    packed = b"".join(packer.compress(block) for _ in range(size >> 20))
    return packed + packer.compress(bytes(size & 0xFFFFF)) + packer.flush()


def plain_png(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """A whole, well-formed, empty PNG: tiny as a file, large when unpacked."""
    samples = {0: 1, 2: 3, 6: 4}[colour]
    row = 1 + (width * depth * samples + 7) // 8
    data = chunk(b"IDAT", zeros(row * height))
    return PNG + header(width, height, depth, colour) + data + chunk(b"IEND", b"")


@cache
def pixel_bomb() -> bytes:
    """50,000 x 50,000 pixels of one bit: 312 MB when unpacked, 2.5 GB as bytes."""
    return plain_png(50_000, 50_000, depth=1)


@cache
def large_png() -> bytes:
    """4,000 x 4,000 pixels with transparency: 64 MB when unpacked."""
    return plain_png(4_000, 4_000, colour=6)


def with_chunks(*chunks: bytes) -> bytes:
    """A good PNG with more chunks after its header."""
    good = png()
    end = len(PNG) + len(header(1, 1))
    return good[:end] + b"".join(chunks) + good[end:]


@cache
def profile_bomb() -> bytes:
    return with_chunks(chunk(b"iCCP", b"icc\0\0" + zeros(100 << 20)))


@cache
def text_bomb() -> bytes:
    packed = zeros(20 << 20)
    return with_chunks(*(chunk(b"zTXt", b"key%d\0\0" % n + packed) for n in range(20)))


@cache
def exif_bomb() -> bytes:
    """An EXIF table that claims four billion entries, and points at itself."""
    table = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0xFFFF)
    entry = struct.pack("<HHII", 0x8769, 4, 0xFFFFFFFF, 8)
    return with_chunks(chunk(b"eXIf", table + entry * 5000))


@cache
def zip_bomb() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        # With no time of day in it, so that it is the same bytes every time.
        archive.writestr(zipfile.ZipInfo("zeros.png"), bytes(50 << 20), zipfile.ZIP_DEFLATED)
    return content.getvalue()


@cache
def gzip_bomb() -> bytes:
    return gzip.compress(bytes(50 << 20), mtime=0)


@cache
def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (200, 200), (n % 256, 0, 0)) for n in range(50)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def refused(rng: random.Random) -> tuple[str, bytes]:
    """A name, and a file that is no single still image of this server's two formats."""
    makers: dict[str, Callable[[], bytes]] = {
        "pixel bomb": pixel_bomb,
        "50,000 x 50,000 with no data": lambda: PNG + header(50_000, 50_000),
        "2 billion wide": lambda: PNG + header(2**31 - 1, 1) + chunk(b"IDAT", zeros(100)),
        "no width": lambda: PNG + header(0, 0) + chunk(b"IEND", b""),
        "cut": lambda: png()[: rng.randrange(0, 60)],
        "data cut": lambda: png(200)[:-40],
        "wrong checksum": lambda: (
            PNG + chunk(b"IHDR", header(28, 28)[8:21], crc=1) + chunk(b"IEND", b"")
        ),
        "GIF of 50 frames": lambda: animated("GIF"),
        "WebP of 50 frames": lambda: animated("WEBP"),
        "TIFF": lambda: encoded(Image.new("L", (28, 28)), "TIFF"),
        "BMP": lambda: encoded(Image.new("L", (28, 28)), "BMP"),
        "zip bomb": zip_bomb,
        "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "text": lambda: b"not an image",
        "empty": lambda: b"",
        "16 bits": lambda: encoded(Image.new("I;16", (28, 28)), "PNG"),
        "JPEG cut": lambda: encoded(Image.new("L", (28, 28)), "JPEG")[:100],
    }
    name = rng.choice(list(makers))
    return name, makers[name]()


def odd(rng: random.Random) -> tuple[str, bytes]:
    """A name, and a file that may be taken or refused, but must do no harm."""
    makers: dict[str, Callable[[], bytes]] = {
        "JPEG in four colours": lambda: encoded(Image.new("CMYK", (28, 28)), "JPEG"),
        "profile bomb": profile_bomb,
        "text bomb": text_bomb,
        "EXIF bomb": exif_bomb,
        "one pixel": lambda: png(1),
        "transparent": lambda: png(40, mode="LA"),
        "palette": lambda: png(40, mode="P"),
        "bilevel": lambda: png(40, mode="1"),
        "one row": lambda: plain_png(10_000, 1),
        "JPEG": lambda: encoded(Image.new("RGB", (50, 60), "red"), "JPEG"),
        "PNG of several frames": lambda: encoded(
            Image.new("L", (28, 28)), "PNG", save_all=True, append_images=[Image.new("L", (28, 28))]
        ),
        "mutated": lambda: mutated(rng, png(28, rng.randrange(100))),
    }
    name = rng.choice([*makers, *["mutated"] * 5])
    return name, makers[name]()


def mutated(rng: random.Random, content: bytes) -> bytes:
    """The same bytes with a few of them changed, cut out, doubled or put in."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        place = rng.randrange(len(changed) + 1)
        size = rng.choice((1, 1, 2, 4, 16, 100))
        match rng.randrange(5):
            case 0:
                changed[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[place : place + size]
            case 2:
                changed[place:place] = rng.randbytes(size)
            case 3:
                changed[place:place] = changed[place : place + size] * rng.choice((1, 2, 50))
            case 4:
                changed[place : place + 1] = rng.choice((b"\0", b"\xff", b"\r\n", b'"', b"[", b"-"))
    return bytes(changed)
