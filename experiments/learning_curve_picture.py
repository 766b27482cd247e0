"""Draw docs/images/omniglot_curve.png: the learning curves of `reptile reproduce`.

python -m experiments.learning_curve_picture artifacts/reproduce/omniglot-5w1s/result.json
"""

import json
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")  # no display is needed

import typer
from matplotlib import pyplot

from experiments import run

PICTURE = Path("docs/images/omniglot_curve.png")
TITLE = "5-way tasks of the training characters, transductive"


def main(
    result: Annotated[Path, typer.Argument(help="The JSON file of `reptile reproduce`.")],
    output: Annotated[Path, typer.Option(help="Where to draw; a PNG.")] = PICTURE,
    title: Annotated[str, typer.Option(help="Above the curves.")] = TITLE,
) -> None:
    """Draw accuracy on validation tasks against meta-iterations, a line for each seed."""
    seeds = json.loads(result.read_text(encoding="utf-8"))["seeds"]
    figure, axes = pyplot.subplots(figsize=(5.6, 3), layout="constrained")
    for seed in seeds:
        points = seed["curve"]
        axes.plot(
            [point["iteration"] for point in points],
            [100 * point["score"] for point in points],
            marker=".",
            color="#2a6f97",
        )
    axes.set_xlabel("meta-iterations")
    axes.set_ylabel("1-shot accuracy, %")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    run(main)
