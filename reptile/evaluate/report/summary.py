"""The scores as a table for the terminal."""

from rich import box
from rich.markup import escape
from rich.table import Table

from reptile.evaluate.metrics import Metrics
from reptile.objectives import objective_named


def summary_table(metrics: Metrics) -> Table:
    """Return the table of an evaluation's metrics: a row for each dataset, shots and mode."""
    objective = objective_named(metrics.objective)
    what = f"{objective.title}, {objective.unit}" if objective.unit else objective.title
    table = Table(
        title=f"few-shot {what} ± 95 % interval",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    several = len(metrics.modes) > 1
    for heading in ("data", "shots", *(["batch norm"] if several else [])):
        table.add_column(heading, no_wrap=True)
    for method in metrics.methods:
        table.add_column(method.replace("_", " "), justify="right", no_wrap=True)
    for dataset, by_shots in metrics.scores.items():
        for shots in by_shots:
            for mode in metrics.modes:
                first = mode == metrics.modes[0]
                cells = [escape(dataset), str(shots)] if first else ["", ""]
                for method in metrics.methods:
                    score = metrics.find(dataset, shots, method, mode)
                    # A method without a network has one score for all modes.
                    shown = score if first or mode in by_shots[shots].get(method, {}) else None
                    text = objective.show(*shown) if shown else ""
                    cells.append(f"[bold]{text}[/bold]" if method == "trained" and text else text)
                table.add_row(*cells[:2], *([mode] if several else []), *cells[2:])
            table.add_section()
    return table
