"""Adapt to a task with `reptile.runtime`, save it, load it again, predict.

    pip install 'reptile-fewshot[cpu]'
    python with_reptile.py path/to/bundle

The images are the bundle's golden ones; yours are uint8 or float arrays in 0..255, [N, C, H, W].
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from reptile.runtime import FewShotModel


def main(bundle: Path) -> None:
    """Adapt to the largest golden task and classify its queries."""
    model = FewShotModel.load(bundle)
    print(f"{model}: golden tensors within {model.check():.1e}")

    tasks = (bundle / "golden").glob("*/support_images.npy")
    folder = max(tasks, key=lambda file: (file.stat().st_size, file)).parent
    images = np.load(folder / "support_images.npy")
    labels = [f"class {label}" for label in np.load(folder / "support_labels.npy")]
    adapted = model.adapt(images, labels)
    if len(adapted.losses):  # none where a classifier is fitted in closed form
        print(f"loss {adapted.losses[0]:.3f} → {adapted.losses[-1]:.3f}")

    with tempfile.TemporaryDirectory() as place:
        adapted.save(Path(place, "classes.task"))
        adapted = model.load_adapted(Path(place, "classes.task"))
    labels, probabilities = adapted.predict(np.load(folder / "query_images.npy"))
    for label, row in zip(labels, probabilities, strict=True):
        print(f"{label}  {row.max():.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} BUNDLE")
    main(Path(sys.argv[1]))
