"""The sinusoids of few-shot regression: y = a·sin(x + φ), drawn instead of read.

a ~ U(0.1, 5), φ ~ U(0, 2π), x ~ U(-5, 5) (Finn et al., arXiv 1703.03400; Nichol et al., arXiv
1803.02999). A class is one sinusoid and its "images" are points, so that a task is, as everywhere,
rows of prepared data. Not for noise: the values are exact.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from reptile.data.dataset import (
    IMAGES_FILE,
    INDEX_FILE,
    TARGETS_FILE,
    DatasetIndex,
    PreparedClass,
    PreparedData,
    Split,
    content_digest,
    load_prepared,
    splits_digest,
)
from reptile.errors import InputError
from reptile.files import atomic_directory, write_json
from reptile.settings import PrepareSettings

NAME = "sinusoid"
SINUSOIDS = 25_000  # so many that a training hardly meets one twice: 1.25 million points of 50 each
AMPLITUDE, PHASE, X = (0.1, 5.0), (0.0, 2 * np.pi), (-5.0, 5.0)


def prepare_sinusoids(
    settings: PrepareSettings, folder: Path, progress: Callable[[int, int], None] | None = None
) -> PreparedData:
    """Draw the sinusoids and their points; replace `folder` in one step.

    Args:
        settings: `images_per_class` is the number of points of each sinusoid, `split_seed` the seed
            of the draw; `validation` and `test` are shares of all sinusoids. The rest is for images
            and has no effect.
        folder: where to write `images.npy` (x), `targets.npy` (y) and `dataset.json`.
        progress: called with the points drawn so far, and all there are.

    Raises:
        InputError: cross-domain sources, which are images; `folder` is as it was before.
    """
    if settings.cross_domain:
        raise InputError(
            f"cross_domain = {list(settings.cross_domain)}: these are images, and a network for "
            "sinusoids takes points; set prepare.cross_domain to []"
        )
    points = settings.images_per_class
    rng = np.random.default_rng(settings.split_seed)
    amplitude, phase = (rng.uniform(*span, (SINUSOIDS, 1)) for span in (AMPLITUDE, PHASE))
    x = rng.uniform(*X, (SINUSOIDS, points)).astype(np.float32)
    y = (amplitude * np.sin(x + phase)).astype(np.float32)  # of x as it is stored

    validation, test = (
        share if isinstance(share, int) else round(share * SINUSOIDS)
        for share in (settings.validation, settings.test)
    )
    # All are drawn alike, so the first may just as well be the ones held out.
    counts: dict[Split, int] = {"test": test, "validation": validation}
    counts["train"] = SINUSOIDS - test - validation
    splits = [split for split, count in counts.items() for _ in range(count)]
    table = tuple(
        PreparedClass(
            name=f"{NAME}{number:05}",
            group="",
            split=split,
            rotation=0,
            start=number * points,
            count=points,
        )
        for number, split in enumerate(splits)
    )
    with atomic_directory(folder) as temporary:
        images, targets = x.reshape(-1, 1, 1, 1), y.reshape(-1, 1)
        for file, array in ((IMAGES_FILE, images), (TARGETS_FILE, targets)):
            np.save(temporary / file, array)
        index = DatasetIndex(
            name=NAME,
            image_shape=(1, 1, 1),
            classes=table,
            content_sha256=content_digest(images, table, targets),
            splits_sha256=splits_digest(table),
            settings=settings.model_dump(mode="json"),
            dtype="float32",
            values=1,
        )
        write_json(temporary / INDEX_FILE, index.model_dump(mode="json"))
    if progress is not None:
        progress(x.size, x.size)
    return load_prepared(folder)
