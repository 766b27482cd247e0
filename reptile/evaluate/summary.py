"""The scores as a table for the terminal, read from metrics.json alone."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from reptile.config import BATCH_NORM_MODES


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """Return the table of an evaluation's metrics: a row for each dataset, shots and mode."""
    table = Table(
        title="few-shot accuracy, % ± 95 % interval", title_justify="left", box=box.SIMPLE
    )
    for heading in ("data", "shots", "batch norm"):
        table.add_column(heading, no_wrap=True)
    for heading in ("trained", "random", "nearest mean"):
        table.add_column(heading, justify="right")
    for dataset, by_shots in metrics.items():
        for shots, methods in by_shots.items():
            nearest = _percent(methods["nearest_mean"], "")
            first = escape(dataset), shots, nearest
            for mode in BATCH_NORM_MODES:
                scores = methods[mode]
                name, number, last = first
                trained = f"[bold]{_percent(scores, '')}[/bold]"
                table.add_row(name, number, mode, trained, _percent(scores, "random_"), last)
                first = "", "", ""
            table.add_section()
    return table


def _percent(scores: Mapping[str, float], prefix: str) -> str:
    mean, interval = scores[f"{prefix}accuracy"], scores[f"{prefix}interval"]
    return f"{100 * mean:.1f} ± {100 * interval:.1f}"
