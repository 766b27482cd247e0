"""Small synthetic data for all rooms: classes of noisy copies of a random pattern."""

import numpy as np

from reptile.data.prepared import (
    DatasetIndex,
    PreparedClass,
    PreparedData,
    splits_digest,
)


def make_data(
    shape: tuple[int, int, int] = (1, 12, 12),
    classes: dict[str, int] | None = None,
    images: int = 20,
    seed: int = 0,
) -> PreparedData:
    """Classes that can be told apart: each image is its class's pattern with pixels flipped."""
    rng = np.random.default_rng(seed)
    splits = classes or {"train": 12, "validation": 6, "test": 8}
    table, blocks = [], []
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
