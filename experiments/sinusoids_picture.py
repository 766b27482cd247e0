"""Draw docs/images/sinusoids.png: new sinusoids, before and after the bundle adapts to them.

    python -m experiments.sinusoids_picture       # after the commands of docs/experiments.md

The tasks are the evaluation's first four, not chosen ones.
"""

from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed

import typer
from matplotlib import pyplot

from experiments import run
from reptile.data.dataset import load_prepared
from reptile.runtime import FewShotRegressor
from reptile.settings import EvaluateSettings
from reptile.tasks import FewShotProtocol, Purpose, held_out_task, random_stream

SHOTS = 10
SEED = 1  # of the preset's evaluation
PICTURE = Path("docs/images/sinusoids.png")


def main(
    artifacts: Annotated[Path, typer.Option(help="Folder of the pipeline.")] = Path("artifacts"),
    output: Annotated[Path, typer.Option(help="Where to draw; a PNG.")] = PICTURE,
) -> None:
    """Draw the predictions before adaptation, after one step and after the bundle's steps."""
    data = load_prepared(artifacts / "prepared")
    model = FewShotRegressor.load(artifacts / "bundle")
    queries = int(data.split("test").counts.min()) - SHOTS
    protocol = FewShotProtocol.of(EvaluateSettings(queries=queries), 1, SHOTS)
    steps = model.bundle.steps
    lines = {0: ("before", "#bc5a26", "-"), 1: ("1 step", "#1f63a0", "--")}
    lines[steps] = (f"{steps} steps", "#1f63a0", "-")
    grid = np.linspace(-5, 5, 201)
    figure, panels = pyplot.subplots(2, 2, figsize=(8.8, 6.2), layout="constrained")
    for number, axes in enumerate(panels.flat):
        stream = random_stream(SEED, Purpose.EVALUATE, SHOTS, number)
        task = held_out_task(stream, data.split("test"), protocol)
        x, y = data.images[task.support].ravel(), task.support_targets.ravel()
        for count, (label, colour, style) in lines.items():
            predicted = model.adapt(x, y, steps=count).predict(grid).ravel()
            axes.plot(grid, predicted, style, color=colour, label=label)
        unseen = data.images[task.query].ravel(), task.query_targets.ravel()
        axes.plot(*unseen, "o", mfc="none", mec="#8a8f94", ms=3, label="other points")
        axes.plot(x, y, "o", color="#1b1b1b", ms=5, label="support set")
        axes.set_title(f"Task {number + 1}", loc="left", fontsize=10, weight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e6e8")
    figure.legend(
        *axes.get_legend_handles_labels(), ncols=5, frameon=False, loc="outside lower center"
    )
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    run(main)
