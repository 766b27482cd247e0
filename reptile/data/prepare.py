"""From a source of images to the prepared dataset: splits, sizes, rotations, hashes.

The splits depend on names and `split_seed` alone, never on a training run, so that no run can test
on what another has trained on. How images are found and decoded is `sources`' business.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image

from reptile.config import PrepareSettings
from reptile.data import sinusoid
from reptile.data.prepared import (
    CROSS_DOMAIN_FOLDER,
    IMAGES_FILE,
    INDEX_FILE,
    DatasetIndex,
    PreparedClass,
    PreparedData,
    Split,
    content_digest,
    load_prepared,
    splits_digest,
)
from reptile.data.sources import Source, open_source
from reptile.errors import InputError
from reptile.files import atomic_directory, write_json
from reptile.images import fit

CHUNK = 256  # images in flight: bounds memory, and how late an error stops the work
ROTATIONS: tuple[Literal[0, 90, 180, 270], ...] = (0, 90, 180, 270)

Progress = Callable[[int, int], None]


def prepare(
    settings: PrepareSettings, folder: Path, progress: Progress | None = None
) -> PreparedData:
    """Prepare `settings.source` and the cross-domain sources; replace `folder` in one step.

    Images are stretched to a square. A class of the training split is followed, with `rotations`,
    by three classes of its turned images. Cross-domain images take the main source's channels.

    Args:
        settings: What to prepare, and how.
        folder: Where to write `images.npy`, `dataset.json` and `cross_domain/`.
        progress: Called now and then with the images read so far, and all there are.

    Raises:
        InputError: a source cannot be used; `folder` is as it was before.
    """
    if settings.source == sinusoid.NAME:
        return sinusoid.prepare_sinusoids(settings, folder, progress)
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


def assign_splits(source: Source, settings: PrepareSettings) -> dict[str, Split]:
    """Say for each class which split it belongs to.

    Groups (or classes) are ordered by a hash of `split_seed` and their name: the first part is
    the test split, the next validation, the rest training; small sets hold out at least one for
    each. So a new group moves few others.

    Raises:
        InputError: there are no groups, or too few for three splits.
    """
    held_out = settings.held_out
    unit = {c.name: c.group if held_out == "groups" else c.name for c in source.classes}
    if "" in unit.values():
        raise InputError(
            f"{source.name}: its classes lie in no groups, so no groups can be held out; "
            "set held_out: classes"
        )
    units = sorted(set(unit.values()), key=partial(_split_key, settings.split_seed))
    test = max(1, round(settings.test * len(units)))
    validation = max(1, round(settings.validation * len(units)))
    train = len(units) - test - validation
    if min(test, validation, train) < 1:
        way_out = " or set held_out: classes" if held_out == "groups" else ""
        raise InputError(
            f"{source.name}: {len(units)} {held_out} make {train} for training, {validation} for "
            f"validation and {test} for test, and each needs one; change the fractions "
            f"(validation = {settings.validation:g}, test = {settings.test:g}){way_out}"
        )
    split: dict[str, Split] = dict.fromkeys(units, "train")
    split |= dict.fromkeys(units[:test], "test")
    split |= dict.fromkeys(units[test : test + validation], "validation")
    return {name: split[group] for name, group in unit.items()}


def _split_key(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


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
    images = open_memmap(folder / IMAGES_FILE, "w+", np.uint8, (rows, *shape))

    def fill(row: int) -> None:
        image = source.read(files[row])
        if mode is None and image.mode != target:
            kinds = {"L": "grey", "RGB": "in colour"}
            raise InputError(
                f"{source.name}: {files[0]} is {kinds[target]} and {files[row]} is "
                f"{kinds[image.mode]}; set channels: grey or channels: rgb"
            )
        images[row] = fit(image, shape)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), CHUNK):
            chunk = range(start, min(start + CHUNK, len(files)))
            tick(sum(1 for _ in pool.map(fill, chunk)))

    upright = {c.name: images[c.start : c.start + c.count] for c in table if c.rotation == 0}
    for c in table:
        if c.rotation:
            turned = np.rot90(upright[c.name], c.rotation // 90, axes=(2, 3))
            images[c.start : c.start + c.count] = turned
    images.flush()

    index = DatasetIndex(
        name=source.name,
        image_shape=shape,
        classes=table,
        content_sha256=content_digest(images, table),
        splits_sha256=splits_digest(table),
        settings=settings.model_dump(mode="json"),
    )
    write_json(folder / INDEX_FILE, index.model_dump(mode="json"))
    return shape
