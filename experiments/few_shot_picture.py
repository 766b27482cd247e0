"""Draw docs/images/few_shot.png: a task of new classes, learnt by the exported bundle.

    python -m experiments.few_shot_picture        # after `make repro`

The task is the evaluation's first, not a chosen one.
"""

from pathlib import Path
from string import ascii_uppercase
from typing import Annotated

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed

import typer
from matplotlib import pyplot
from matplotlib.axes import Axes

from experiments import run
from reptile.data.dataset import load_prepared
from reptile.runtime import FewShotModel
from reptile.settings import EvaluateSettings
from reptile.tasks import FewShotProtocol, Purpose, held_out_task, random_stream

QUERIES = 4
PICTURE = Path("docs/images/few_shot.png")


def main(
    artifacts: Annotated[Path, typer.Option(help="Folder of the pipeline.")] = Path("artifacts"),
    output: Annotated[Path, typer.Option(help="Where to draw; a PNG.")] = PICTURE,
) -> None:
    """Draw one example of each class, the predictions for new images, and the learning curve."""
    data = load_prepared(artifacts / "prepared")
    model = FewShotModel.load(artifacts / "bundle")
    ways = model.ways
    protocol = FewShotProtocol.of(EvaluateSettings(queries=QUERIES), ways, 1)
    task = held_out_task(random_stream(1, Purpose.EVALUATE, 1, 0), data.split("test"), protocol)
    images = data.images[task.support]
    adapted = model.adapt(images, [ascii_uppercase[label] for label in task.support_targets])
    queries = data.images[task.query].reshape(ways, QUERIES, *data.image_shape)
    predictions = np.reshape(adapted.predict(data.images[task.query]).labels, (ways, QUERIES))

    figure = pyplot.figure(figsize=(11, 5), layout="constrained")
    support, query, curve = figure.subfigures(1, 3, width_ratios=[1.3, 4, 3], squeeze=False)[0]
    support.suptitle("one example each", fontsize=11)
    query.suptitle("new images and their predicted classes", fontsize=11)
    for way, row in enumerate(support.subplots(ways, 1, squeeze=False)):
        _show(row[0], images[way])
        row[0].set_ylabel(ascii_uppercase[way], rotation=0, labelpad=14, va="center", fontsize=14)
    for way, row in enumerate(query.subplots(ways, QUERIES, squeeze=False)):
        for number, axes in enumerate(row):
            _show(axes, queries[way, number])
            label = predictions[way, number]
            colour = "#1a7f37" if label == ascii_uppercase[way] else "#cf222e"
            place = {"transform": axes.transAxes, "ha": "right", "va": "top"}
            axes.text(1, 1, label, fontsize=12, weight="bold", color=colour, **place)
    axes = curve.subplots()
    axes.plot(np.arange(1, len(adapted.losses) + 1), adapted.losses, color="#0969da")
    axes.set(xlabel="gradient step", ylabel="loss", yscale="log")
    axes.set_title("learning, inside ONNX Runtime", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def _show(axes: Axes, image: np.ndarray) -> None:
    pixels = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    run(main)
