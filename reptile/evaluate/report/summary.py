"""The scores as a table for the terminal."""

from rich import box
from rich.markup import escape
from rich.table import Table

from reptile.evaluate.metrics import Metrics
from reptile.objectives import objective_named


def summary_table(metrics: Metrics) -> Table:
    """Return the table of an evaluation's metrics: a row for each method and mode."""
    objective = objective_named(metrics.objective)
    what = f"{objective.title}, {objective.unit}" if objective.unit else objective.title
    table = Table(
        title=f"few-shot {what} ± 95 % interval",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    for dataset, shots in metrics.columns:
        table.add_column(f"{escape(dataset)} {shots}-shot", justify="right")
    for method, mode, cells in metrics.table():
        label = method if mode == "none" else f"{method}, {mode.replace('_', '-')}"
        table.add_row(escape(label), *cells, style="bold" if method == metrics.learner else None)
    return table
