"""The starter dataset: characters of invented alphabets, written by simulated hands.

The letters of an alphabet share a few stroke shapes; every drawing adds motor noise, an affine map
and a pen width. Made to be about as hard as Omniglot, and so that what is learnt here is of use
there (experiments/starter_dataset.py measures both); not to imitate any real script.
"""

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from reptile.files import atomic_file

SIZE = 28
GREY_STEP = 17  # 16 grey levels: half the file size of 256, and no eye sees the difference

Floats = npt.NDArray[np.float64]
Images = npt.NDArray[np.uint8]


class Character(NamedTuple):
    """What a letter should look like, before a hand writes it, in a unit square.

    Attributes:
        segments: Cubic Bézier control points, [segments, 4, 2].
        stroke: The pen stroke each segment belongs to, [segments], ascending from 0.
    """

    segments: Floats
    stroke: npt.NDArray[np.int64]


def draw_glyphs(
    *, seed: int = 0, alphabets: int = 30, characters: int = 20, hands: int = 20
) -> Images:
    """Draw the dataset: uint8 [alphabets, characters, hands, 28, 28], dark ink on white.

    The same seed gives the same bytes. A character depends on the seed and its place only, so a
    larger dataset contains the smaller one of the same seed.
    """
    images = np.empty((alphabets, characters, hands, SIZE, SIZE), np.uint8)
    for alphabet in range(alphabets):
        rng = np.random.default_rng([seed, alphabet])
        shapes = [_stroke_shape(rng) for _ in range(rng.integers(6, 14))]
        for character in range(characters):
            rng = np.random.default_rng([seed, alphabet, character])
            letter = _invent(rng, shapes)
            for hand in range(hands):
                images[alphabet, character, hand] = _write_by_hand(rng, letter)
    return images


def glyph_name(alphabet: int, character: int, hand: int) -> str:
    """Return a drawing's place in the dataset, as in `alphabet01/character03/07.png`."""
    return f"alphabet{alphabet + 1:02}/character{character + 1:02}/{hand + 1:02}.png"


def write_glyphs(
    path: Path, *, seed: int = 0, alphabets: int = 30, characters: int = 20, hands: int = 20
) -> None:
    """Write the dataset as a zip of 4-bit PNG files, one folder a class.

    The same seed and library versions give the same bytes, so that the file can be versioned.
    """
    images = draw_glyphs(seed=seed, alphabets=alphabets, characters=characters, hands=hands)
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for place in np.ndindex(images.shape[:3]):
            png = io.BytesIO()
            Image.fromarray(images[place]).save(png, "PNG", bits=4, optimize=True)
            entry = zipfile.ZipInfo(glyph_name(*place))  # dated 1980: no clock in the bytes
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, png.getvalue())


def _stroke_shape(rng: np.random.Generator) -> Floats:
    """One line, arc, wave or loop that starts at the origin: control points [4, 2]."""
    if rng.random() < 0.8:  # writing prefers upright and level strokes, and then slanting ones
        angle = rng.choice(8, p=[0.18, 0.07] * 4) * np.pi / 4 + rng.normal(0, 0.1)
    else:
        angle = rng.uniform(0, 2 * np.pi)
    end = rng.uniform(0.25, 0.6) * np.array([np.cos(angle), np.sin(angle)])
    side = np.array([-end[1], end[0]])
    match rng.choice(4, p=[0.5, 0.27, 0.05, 0.18]):
        case 0:  # line
            inner = [end / 3, end * 2 / 3]
        case 1:  # arc
            bend = side * rng.uniform(-0.9, 0.9)
            inner = [end * 0.25 + bend, end * 0.75 + bend]
        case 2:  # wave
            bend = side * rng.uniform(0.3, 1.0)
            inner = [end * 0.3 + bend, end * 0.7 - bend]
        case _:  # loop: comes back to its start
            bend = side * rng.uniform(1.0, 1.6) * rng.choice([-1, 1])
            inner, end = [bend + end * 1.5, bend - end * 1.5], np.zeros(2)
    return np.stack([np.zeros(2), *inner, end])


def _invent(rng: np.random.Generator, shapes: list[Floats]) -> Character:
    """A letter of one to four strokes of an alphabet's shapes, most strokes touching another."""
    segments: list[Floats] = []
    stroke: list[int] = []
    for number in range(rng.choice([1, 2, 3, 4], p=[0.2, 0.4, 0.28, 0.12])):
        if number == 0 or rng.random() < 0.25:
            pen = rng.uniform(0.15, 0.85, 2)
        else:
            pen = rng.choice(_curves(np.stack(segments), 7).reshape(-1, 2))
        for _ in range(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])):
            shape = shapes[rng.integers(len(shapes))]
            segments.append(pen + shape * rng.uniform(0.7, 1.2))
            stroke.append(number)
            pen = segments[-1][-1]
    control = np.stack(segments)
    ink = _curves(control, 24)
    low, high = ink.min((0, 1)), ink.max((0, 1))
    # Letters fill 0.75 of the square, except that a dot or a dash must not blow up into a letter.
    scale = 0.75 / max((high - low).max(), 0.25)
    if np.hypot(*np.diff(ink, axis=1).T).sum() * scale > 3.2:
        return _invent(rng, shapes)  # so much ink in the square would be a tangle
    return Character((control - (low + high) / 2) * scale + 0.5, np.array(stroke))


def _write_by_hand(rng: np.random.Generator, letter: Character) -> Images:
    """One drawing [28, 28]. The noise levels make the dataset as hard as Omniglot, no milder."""
    control = letter.segments + rng.normal(0, 0.032, letter.segments.shape)
    joined = 1 + np.flatnonzero(np.diff(letter.stroke) == 0)
    control[joined, 0] = control[joined - 1, 3]  # the pen is not lifted within a stroke
    drift = rng.normal(0, 0.035, (letter.stroke[-1] + 1, 1, 2))[letter.stroke]
    turn = rng.normal(0, 0.12)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    affine = (np.eye(2) + rng.normal(0, 0.15, (2, 2))) @ rotation * rng.uniform(0.72, 1.05)
    control = (control - 0.5) @ affine.T + 0.5 + rng.normal(0, 0.05, 2) + drift
    ink = _rasterise(_curves(control * SIZE, 8), radius=rng.uniform(0.65, 0.8))
    return (np.rint((1 - ink) * (255 // GREY_STEP)) * GREY_STEP).astype(np.uint8)


def _curves(control: Floats, pieces: int) -> Floats:
    """Points along cubic Béziers: [segments, 4, 2] → [segments, pieces + 1, 2]."""
    t = np.linspace(0, 1, pieces + 1)[:, None]
    a, b, c, d = control.transpose(1, 0, 2)[:, :, None]
    points: Floats = (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d
    return points


def _rasterise(curves: Floats, radius: float) -> Floats:
    """Ink in 0..1 of a round pen along polylines in pixels: [lines, points, 2] → [28, 28].

    A pixel's ink follows from its distance to the nearest piece, which is smooth at edges and
    round at ends and joints. Plain arithmetic, no BLAS: the same bytes on every processor.
    """
    start = curves[:, :-1].reshape(-1, 2)
    along = np.diff(curves, axis=1).reshape(-1, 2)
    centre = np.arange(SIZE) + 0.5
    x = centre[None, :, None] - start[:, 0]
    y = centre[:, None, None] - start[:, 1]
    square = np.maximum((along**2).sum(1), 1e-12)
    t = ((x * along[:, 0] + y * along[:, 1]) / square).clip(0, 1)
    distance = np.sqrt(((x - t * along[:, 0]) ** 2 + (y - t * along[:, 1]) ** 2).min(-1))
    ink: Floats = (radius + 0.5 - distance).clip(0, 1)
    return ink
