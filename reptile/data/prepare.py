"""From a source to the prepared dataset; of images: splits, sizes, rotations, hashes.

Not for finding and decoding images (see `readers`) or choosing what is held out (see `splits`).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib.format import write_array_header_1_0
from PIL import Image

from reptile.cpus import available_cpus
from reptile.data.array_files import is_arrays, prepare_arrays
from reptile.data.dataset import (
    CROSS_DOMAIN_FOLDER,
    IMAGES_FILE,
    INDEX_FILE,
    DatasetIndex,
    PreparedClass,
    PreparedData,
    Split,
    UInt8Array,
    content_header,
    load_prepared,
    splits_digest,
)
from reptile.data.readers import sinusoid
from reptile.data.readers.base import Source
from reptile.data.readers.open import open_source
from reptile.data.readers.table import is_table
from reptile.data.splits import assign_splits
from reptile.data.tables import prepare_table
from reptile.errors import InputError
from reptile.files import atomic_directory, write_json
from reptile.images import fit
from reptile.settings import PrepareSettings

CHUNK = 256  # images in flight: bounds memory, and how late an error stops the work
CHUNK_BYTES = 32 * 2**20
ROTATIONS: tuple[Literal[0, 90, 180, 270], ...] = (0, 90, 180, 270)

Progress = Callable[[int, int], None]


def prepare(
    settings: PrepareSettings, folder: Path, progress: Progress | None = None
) -> PreparedData:
    """Prepare `settings.source` and the cross-domain sources; replace `folder` in one step.

    A table, arrays and sinusoids: see `prepare_table`, `prepare_arrays` and `prepare_sinusoids`.
    Images are stretched to a square. A class of the training split is followed, with `rotations`,
    by three classes of its turned images. Cross-domain images take the main source's channels.

    Args:
        settings: What to prepare, and how.
        folder: Where to write `images.npy`, `dataset.json` and `cross_domain/`.
        progress: Called now and then with the images read so far, and all there are.

    Raises:
        InputError: a source cannot be used; `folder` is as it was before.
    """
    of_table, of_arrays = is_table(settings.source), is_arrays(settings.source)
    for name, fits, what in (
        ("table", of_table, "tables (.csv, .tsv, .parquet)"),
        ("windows", of_arrays, "arrays (.npz, .safetensors, a folder with inputs.npy)"),
        ("order", of_table or of_arrays, "tables and arrays"),
    ):
        if getattr(settings, name) != PrepareSettings.model_fields[name].default and not fits:
            raise InputError(
                f"prepare.{name}: is for {what}, and {settings.source} is none; leave it out"
            )
    if settings.source == sinusoid.NAME:
        return sinusoid.prepare_sinusoids(settings, folder, progress)
    if of_table or of_arrays:
        if settings.cross_domain:
            raise InputError(
                f"cross_domain = {list(settings.cross_domain)}: these are images, and "
                f"{settings.source} has none; set prepare.cross_domain to []"
            )
        prepare_rows = prepare_table if of_table else prepare_arrays
        return prepare_rows(settings, folder, progress)
    with ExitStack() as stack:
        source, *others = (
            stack.enter_context(open_source(name))
            for name in (settings.source, *settings.cross_domain)
        )
        for each in (source, *others):
            _check_sizes(each, settings.images_per_class)
        names = [other.name for other in others]
        if len(set(names)) < len(names):
            raise InputError(f"cross_domain: two sources of one name ({', '.join(names)})")
        splits = assign_splits(source, settings)
        mode = {"grey": "L", "rgb": "RGB"}.get(settings.channels)

        counts = (_image_count(each) for each in (source, *others))
        tick = _counter(sum(counts), progress)
        with atomic_directory(folder) as temporary:
            table = _class_table(source, splits, ROTATIONS if settings.rotations else (0,))
            shape = _write(source, table, mode, settings, temporary, tick)
            for other in others:
                target = temporary / CROSS_DOMAIN_FOLDER / other.name
                target.mkdir(parents=True)
                table = _class_table(other, {c.name: "test" for c in other.classes}, (0,))
                _write(other, table, "L" if shape[0] == 1 else "RGB", settings, target, tick)
    return load_prepared(folder)


def _image_count(source: Source) -> int:
    return sum(len(c.files) for c in source.classes)


def _check_sizes(source: Source, least: int) -> None:
    for c in source.classes:
        if len(c.files) < least:
            raise InputError(
                f"{source.name}: class {c.name} has {len(c.files)} of the {least} images that "
                "images_per_class asks for; add images, remove the class, or lower that setting"
            )


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def tick(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total)

    return tick


def _class_table(
    source: Source, splits: dict[str, Split], rotations: tuple[Literal[0, 90, 180, 270], ...]
) -> tuple[PreparedClass, ...]:
    """All classes of the source, then the turned classes of the training split."""

    def entries() -> Iterator[PreparedClass]:
        start = 0
        for rotation in rotations:
            for c in source.classes:
                split = splits[c.name]
                if rotation == 0 or split == "train":
                    yield PreparedClass(
                        name=c.name,
                        group=c.group,
                        split=split,
                        rotation=rotation,
                        start=start,
                        count=len(c.files),
                    )
                    start += len(c.files)

    return tuple(entries())


def _write(
    source: Source,
    table: tuple[PreparedClass, ...],
    mode: str | None,
    settings: PrepareSettings,
    folder: Path,
    tick: Callable[[int], None],
) -> tuple[int, int, int]:
    """Write one dataset and return its image shape. Without a mode, all files must have one."""
    files = [file for c in source.classes for file in c.files]
    target = mode or source.read(files[0]).mode
    size = settings.image_size
    shape = (len(Image.new(target, (1, 1)).getbands()), size, size)
    rows = table[-1].start + table[-1].count

    def pixels(file: str) -> UInt8Array:
        image = source.read(file)
        if mode is None and image.mode != target:
            colours = {"L": "grey", "RGB": "in colour"}
            raise InputError(
                f"{source.name}: {files[0]} is {colours[target]} and {file} is "
                f"{colours[image.mode]}; set channels: grey or channels: rgb"
            )
        return fit(image, shape)

    # Written as a plain file: the pages of a mapped one would count as this process's memory.
    path = folder / IMAGES_FILE
    with path.open("wb") as output, path.open("rb") as written:
        write_array_header_1_0(
            output, {"descr": "|u1", "fortran_order": False, "shape": (rows, *shape)}
        )
        first_row = output.tell()
        digest = hashlib.sha256(content_header((rows, *shape), table))
        most = max(1, min(CHUNK, CHUNK_BYTES // prod(shape)))

        def append(images: UInt8Array) -> None:
            content = np.ascontiguousarray(images).data
            output.write(content)
            digest.update(content)

        for images in _in_order(pixels, files, most):
            append(images)
            tick(len(images))
        output.flush()
        upright = {c.name: c.start for c in table if c.rotation == 0}
        for c in table:
            if c.rotation:
                written.seek(first_row + upright[c.name] * prod(shape))
                for start in range(0, c.count, most):
                    count = min(most, c.count - start)
                    images = np.fromfile(written, np.uint8, count * prod(shape))
                    turned = np.rot90(images.reshape(count, *shape), c.rotation // 90, axes=(2, 3))
                    append(turned)

    index = DatasetIndex(
        name=source.name,
        image_shape=shape,
        classes=table,
        content_sha256=digest.hexdigest(),
        splits_sha256=splits_digest(table),
        settings=settings.model_dump(mode="json"),
    )
    write_json(folder / INDEX_FILE, index.model_dump(mode="json"))
    return shape


def _in_order(
    pixels: Callable[[str], UInt8Array], files: Sequence[str], most: int
) -> Iterator[UInt8Array]:
    """Read files on all processors; yield their images stacked, at most so many at a time."""
    chunks = [files[start : start + most] for start in range(0, len(files), most)]
    with ThreadPoolExecutor(available_cpus(), "reading") as pool:
        ahead = pool.map(pixels, chunks[0])
        for chunk in (*chunks[1:], ()):
            current, ahead = ahead, pool.map(pixels, chunk)  # read while these are written
            yield np.stack(list(current))
