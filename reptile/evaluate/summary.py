"""The scores as a table for the terminal, read from metrics.json alone."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from reptile.config import BATCH_NORM_MODES
from reptile.evaluate.measure import BASELINES, STARTS
from reptile.kinds import Kind, kind_scored


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """Return the table of an evaluation's metrics: a row for each dataset, shots and mode."""
    kind = kind_scored(next(iter(next(iter(metrics.values())).values()))[BATCH_NORM_MODES[0]])
    what = f"{kind.title}, {kind.unit}" if kind.unit else kind.title
    table = Table(title=f"few-shot {what} ± 95 % interval", title_justify="left", box=box.SIMPLE)
    baseline = BASELINES[kind]
    for heading in ("data", "shots", "batch norm"):
        table.add_column(heading, no_wrap=True)
    for heading in (*STARTS[kind], baseline.title):
        table.add_column(heading, justify="right")
    for dataset, by_shots in metrics.items():
        for shots, methods in by_shots.items():
            first = escape(dataset), shots, _score(kind, methods[baseline.name], "")
            for mode in BATCH_NORM_MODES:
                scores = methods[mode]
                name, number, last = first
                trained = f"[bold]{_score(kind, scores, '')}[/bold]"
                others = [_score(kind, scores, f"{start}_") for start in STARTS[kind][1:]]
                table.add_row(name, number, mode, trained, *others, last)
                first = "", "", ""
            table.add_section()
    return table


def _score(kind: Kind, scores: Mapping[str, float], prefix: str) -> str:
    return kind.show(scores[f"{prefix}{kind.metric}"], scores[f"{prefix}interval"])
