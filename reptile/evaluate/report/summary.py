"""The scores as a table for the terminal."""

from rich import box
from rich.markup import escape
from rich.table import Table

from reptile.evaluate.methods import title
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
    rows = list(metrics.table())
    several = any(mode != "none" for _, mode, _ in rows)
    table.add_column("method")
    if several:
        table.add_column("batch norm", no_wrap=True)
    for dataset, shots in metrics.columns:
        table.add_column(f"{escape(dataset)} {shots}-shot", justify="right", no_wrap=True)
    shown = ""
    for method, mode, cells in rows:
        bold = method == metrics.learner
        words = [
            escape(title(method)) if method != shown else "",
            *([mode.replace("_", "-") if mode != "none" else ""] if several else []),
            *cells,
        ]
        table.add_row(*words, style="bold" if bold else None)
        shown = method
    return table
