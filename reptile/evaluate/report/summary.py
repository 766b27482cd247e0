"""The scores as a table for the terminal, read from metrics.json alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from reptile.evaluate.measure import BASELINES, STARTS
from reptile.objectives import Objective, objective_scored
from reptile.settings import BATCH_NORM_MODES, BatchNormMode


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """Return the table of an evaluation's metrics: a row for each dataset, shots and mode."""
    objective = objective_scored(
        next(iter(next(iter(metrics.values())).values()))[BATCH_NORM_MODES[0]]
    )
    what = f"{objective.title}, {objective.unit}" if objective.unit else objective.title
    table = Table(
        title=f"few-shot {what} ± 95 % interval",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    baseline = BASELINES[objective]
    modes = _modes(metrics)
    for heading in ("data", "shots", *(["batch norm"] if len(modes) > 1 else [])):
        table.add_column(heading, no_wrap=True)
    for heading in (*STARTS[objective], baseline.title):
        table.add_column(heading, justify="right", no_wrap=True)
    for dataset, by_shots in metrics.items():
        for shots, methods in by_shots.items():
            first = escape(dataset), shots, _score(objective, methods[baseline.name], "")
            for mode in modes:
                scores = methods[mode]
                name, number, last = first
                trained = f"[bold]{_score(objective, scores, '')}[/bold]"
                others = [_score(objective, scores, f"{start}_") for start in STARTS[objective][1:]]
                shown = [mode] if len(modes) > 1 else []
                table.add_row(name, number, *shown, trained, *others, last)
                first = "", "", ""
            table.add_section()
    return table


def _modes(metrics: Mapping[str, Any]) -> Sequence[BatchNormMode]:
    """Return the modes to show: one of them, if without batch norm all are the same."""
    every = [methods for by_shots in metrics.values() for methods in by_shots.values()]
    same = all(methods[mode] == methods["frozen"] for methods in every for mode in BATCH_NORM_MODES)
    return ("frozen",) if same else BATCH_NORM_MODES


def _score(objective: Objective, scores: Mapping[str, float], prefix: str) -> str:
    return objective.show(scores[f"{prefix}{objective.metric}"], scores[f"{prefix}interval"])
