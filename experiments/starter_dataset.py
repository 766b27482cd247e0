"""Is the starter dataset a stand-in for the real thing? Compare with Omniglot alphabets.

    python -m experiments.starter_dataset omniglot.zip --iterations 2500

Meta-trains on the drawn glyphs and on Omniglot's training alphabets, for the same iterations, and
tests both on the same Omniglot alphabets that neither has seen.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from experiments import run
from reptile.data.prepare import prepare
from reptile.evaluate import evaluate
from reptile.learn.run import run_training
from reptile.settings import EvaluateSettings, PrepareSettings, TrainSettings


def main(
    omniglot: Annotated[Path, typer.Argument(help="Zip or folder of Omniglot alphabets.")],
    iterations: int = 2500,
    tasks: int = 600,
    test: Annotated[float, typer.Option(help="Share of the alphabets to test on.")] = 0.4,
) -> None:
    """Print 1-shot and 5-shot accuracy on Omniglot, trained on glyphs and on Omniglot."""
    table = Table(title=f"on held-out Omniglot alphabets, {iterations} meta-iterations, %")
    for heading in ("meta-trained on", "shots", "transductive", "frozen", "random, transductive"):
        table.add_column(heading)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        real = prepare(
            PrepareSettings(source=str(omniglot), cross_domain=(), test=test), root / "omniglot"
        )
        drawn = prepare(PrepareSettings(source="glyphs", cross_domain=()), root / "glyphs")
        for data in (drawn, real):
            settings = TrainSettings(meta_iterations=iterations, checkpoint_every=iterations)
            checkpoint = run_training(settings, data, root / "work")
            others = {} if data is real else {real.name: real}
            result = evaluate(EvaluateSettings(tasks=tasks), checkpoint, data, others)
            for measurement in result.of(real.name):
                scores = [
                    measurement.score("trained", "transductive"),
                    measurement.score("trained", "frozen"),
                    measurement.score("random", "transductive"),
                ]
                cells = [f"{100 * mean:.1f} ± {100 * interval:.1f}" for mean, interval in scores]
                table.add_row(data.name, str(measurement.shots), *cells)
    Console().print(table)


if __name__ == "__main__":
    run(main)
