"""Which sum of inner-loop gradients is worth moving along? The paper's study (figure 3), scaled.

    python -m experiments.gradients --data alphabets.zip --iterations 2000 --plot gradients.png

Four mini-batches of a task share no image and give the gradients g1 … g4. The mean of the first k
is Reptile's direction after k steps, the k-th alone first-order MAML's: both are the library's own
algorithms, with as many inner steps, and a meta-step that gives each the same sum of weights: that
of plain Reptile after all four.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed

import typer
from matplotlib import pyplot
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments import run
from reptile.data.dataset import PreparedData
from reptile.data.prepare import prepare
from reptile.evaluate import Score
from reptile.experiments.presets import load_preset, preset_path
from reptile.files import atomic_file, write_json
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.engines import choose_device, make_engine
from reptile.learn.optimizer import fresh_state
from reptile.learn.reptile import MetaState
from reptile.learn.run import run_training
from reptile.learn.train import Progress as TrainingProgress
from reptile.learn.validate import adapted_in_chunks
from reptile.models import initialise
from reptile.settings import EvaluateSettings, Settings, TrainSettings, load_settings
from reptile.tasks import FewShotProtocol, Purpose, check_classes, held_out_task, random_stream

PRESET = "omniglot-gradients"
OUTPUT = Path("artifacts/gradients")
COLOURS: dict[str, str] = {"reptile": "#2a6f97", "fomaml": "#c1440e"}
LABELS = {"reptile": "mean of g1 … gk: Reptile", "fomaml": "gk alone: first-order MAML"}


class Combination(NamedTuple):
    """One way to make an outer step of the inner gradients."""

    algorithm: Literal["reptile", "fomaml"]
    steps: int

    @property
    def label(self) -> str:
        """What is summed."""
        if self.algorithm == "fomaml" or self.steps == 1:
            return f"g{self.steps}"
        return f"1/{self.steps} ({' + '.join(f'g{i + 1}' for i in range(self.steps))})"

    def settings(self, base: TrainSettings) -> TrainSettings:
        """Return the settings of training along this combination."""
        share = base.inner_steps / (self.steps if self.algorithm == "reptile" else 1)
        return base.model_copy(
            update={
                "algorithm": self.algorithm,
                "inner_steps": self.steps,
                "meta_step": base.meta_step * share,
            }
        )


def combinations(steps: int) -> list[Combination]:
    """Return all of up to so many steps; with one step both algorithms are the same."""
    sums = [Combination("reptile", k) for k in range(1, steps + 1)]
    return sums + [Combination("fomaml", k) for k in range(2, steps + 1)]


def main(
    data: Annotated[str, typer.Option(help="Folder or zip of Omniglot's alphabets.")] = (
        "datasets/omniglot"
    ),
    iterations: Annotated[int, typer.Option(min=1, help="The paper: 40,000.")] = 2000,
    changes: Annotated[
        list[str] | None, typer.Option("--set", "-S", help="Change a setting of the preset.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for data, checkpoints, JSON.")] = OUTPUT,
    plot: Annotated[Path | None, typer.Option(help="Where to draw; a PNG.")] = None,
) -> None:
    """Meta-train along each combination and test 5-shot on held-out classes."""
    settings = load_settings(
        preset_path(PRESET),
        [f"prepare.source={data}", f"train.meta_iterations={iterations}", *(changes or ())],
    )
    images = prepare(settings.prepare, output / "prepared")
    every = combinations(settings.train.inner_steps)
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as bar:
        for combination in every:
            own = combination.settings(settings.train)
            task = bar.add_task(combination.label, total=own.meta_iterations)

            def observe(progress: TrainingProgress, task: Any = task) -> None:
                bar.update(task, completed=progress.iteration)

            trained = run_training(
                own, images, output / "training", resume=True, on_progress=observe
            )
            rows.append(_row(combination, settings.evaluate, trained, images))
    weights = initialise(trained.model, settings.train.seed)
    start = trained._replace(state=MetaState(weights, fresh_state(weights)))
    untrained = measure(settings.evaluate, start, images)
    result = {
        "settings": settings.model_dump(mode="json", include={"prepare", "train", "evaluate"}),
        "random_start": asdict(untrained),
        "combinations": rows,
    }
    write_json(output / "gradients.json", result)
    draw(rows, untrained, settings, plot or output / "gradients.png")
    table = Table("gradients", "algorithm", "inner steps", "accuracy, %")
    for row in rows:
        score = f"{100 * row['accuracy']:.1f} ± {100 * row['interval']:.1f}"
        table.add_row(row["gradients"], row["algorithm"], str(row["steps"]), score)
    score = f"{100 * untrained.mean:.1f} ± {100 * untrained.interval:.1f}"
    table.add_row("none (random start)", "", "", score)
    Console().print(table)


def measure(settings: EvaluateSettings, checkpoint: Checkpoint, data: PreparedData) -> Score:
    """Return the transductive accuracy on held-out classes at the fewest shots."""
    model, state, info = checkpoint.model, checkpoint.meta, checkpoint.info
    training, classes = info.settings, data.split("test")
    protocol = FewShotProtocol.of(settings, training.ways, min(settings.shots))
    check_classes(classes, protocol.ways, protocol.shots + protocol.queries, "test split")
    device = choose_device(training.device)
    engine = make_engine(training.engine, model, training.optimizer, data.images, device)
    tasks = [
        held_out_task(
            random_stream(settings.seed, Purpose.EVALUATE, protocol.shots, number),
            classes,
            protocol,
        )
        for number in range(settings.tasks)
    ]
    accuracies: list[float] = []
    for chunk, weights in adapted_in_chunks(engine, state, tasks):
        predicted = engine.predict(weights, chunk, "transductive").argmax(-1).cpu().numpy()
        labels = np.stack([task.query_targets for task in chunk])
        accuracies += (predicted == labels).mean(-1).tolist()
    return Score.of(np.array(accuracies))


def draw(rows: list[dict[str, Any]], untrained: Score, settings: Settings, path: Path) -> None:
    """Draw final accuracy against the number of inner steps, a line for each algorithm."""
    figure, axes = pyplot.subplots(figsize=(5.6, 3.4), layout="constrained")
    for algorithm, label in LABELS.items():
        points = [row for row in rows if row["algorithm"] == algorithm or row["steps"] == 1]
        axes.errorbar(
            [row["steps"] for row in points],
            [100 * row["accuracy"] for row in points],
            [100 * row["interval"] for row in points],
            color=COLOURS[algorithm],
            label=label,
            marker="o",
            capsize=3,
        )
    axes.axhline(100 * untrained.mean, color="#9aa5ad", linestyle="--", label="random start")
    axes.set_xticks(sorted({row["steps"] for row in rows}))
    axes.set_xlabel("inner steps k, each on images of its own")
    axes.set_ylabel("5-way accuracy on held-out classes, %")
    paper = load_preset(PRESET).settings.train.meta_iterations
    axes.set_title(
        f"{settings.train.meta_iterations:,} iterations (the paper: {paper:,}), "
        f"{min(settings.evaluate.shots)}-shot",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def _row(
    combination: Combination, settings: EvaluateSettings, trained: Checkpoint, data: PreparedData
) -> dict[str, Any]:
    score = measure(settings, trained, data)
    return {
        "gradients": combination.label,
        "algorithm": combination.algorithm,
        "steps": combination.steps,
        "accuracy": score.mean,
        "interval": score.interval,
        "curve": [point.model_dump(mode="json") for point in trained.info.curve],
    }


if __name__ == "__main__":
    run(main)
