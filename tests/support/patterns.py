"""Small synthetic data for all rooms: classes of noisy copies of a random pattern."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from reptile.data.dataset import (
    DatasetIndex,
    PreparedClass,
    PreparedData,
    Split,
    splits_digest,
)


def make_data(
    shape: tuple[int, int, int] = (1, 12, 12),
    classes: Mapping[Split, int] | None = None,
    images: int = 20,
    seed: int = 0,
) -> PreparedData:
    """Classes that can be told apart: each image is its class's pattern with pixels flipped."""
    rng = np.random.default_rng(seed)
    splits: Mapping[Split, int] = classes or {"train": 12, "validation": 6, "test": 8}
    table: list[PreparedClass] = []
    blocks: list[np.ndarray] = []
    for split, count in splits.items():
        for number in range(count):
            pattern = rng.random(shape) < 0.3
            flips = rng.random((images, *shape)) < 0.1
            blocks.append(np.where(pattern ^ flips, 0, 255).astype(np.uint8))
            table.append(
                PreparedClass(
                    name=f"{split}{number}",
                    group="",
                    split=split,
                    rotation=0,
                    start=len(table) * images,
                    count=images,
                )
            )
    index = DatasetIndex(
        name="patterns",
        image_shape=shape,
        classes=tuple(table),
        content_sha256=f"{seed:064x}",
        splits_sha256=splits_digest(table),
        settings={},
    )
    return PreparedData(np.concatenate(blocks), index)


def draw_letters(folder: Path, groups: int = 5, classes: int = 6, images: int = 6) -> None:
    """Write class folders of noisy copies of a random pattern."""
    rng = np.random.default_rng(0)
    for group in range(groups):
        for number in range(classes):
            place = folder / f"group{group}" / f"class{number}"
            place.mkdir(parents=True)
            pattern = rng.random((14, 14)) < 0.3
            for image in range(images):
                pixels = np.where(pattern ^ (rng.random((14, 14)) < 0.05), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{image}.png")
