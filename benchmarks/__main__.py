"""The command line: measure the named rows and show them as one table.

    python -m benchmarks omniglot-5way busy-core --plot speed.png

What each row measures, and how to read it: docs/speed.md.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import CASES, Work
from benchmarks.machine import OtherWork, describe_machine
from benchmarks.results import Results, Row, read_results, write_results
from benchmarks.rows import ROWS
from benchmarks.show import markdown, table
from benchmarks.timing import FULL, QUICK
from reptile.cpus import available_cpus
from reptile.errors import InputError

RESULTS = Path("artifacts/bench.json")

console = Console(width=None if sys.stdout.isatty() else 110)
messages = Console(stderr=True)


def main(
    rows: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(ROWS)}; all if none is named.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only check that everything runs; no usable figures.")
    ] = False,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of torch and of the native engine.")
    ] = 2,
    json: Annotated[Path, typer.Option(help="File for all rounds.")] = RESULTS,
    plot: Annotated[Path | None, typer.Option(help="Also draw the figures, as PNG.")] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table in Markdown.")
    ] = False,
    shown: Annotated[
        Path | None, typer.Option(help="Show this earlier run's JSON instead of measuring.")
    ] = None,
) -> None:
    """Time the library, each figure with its baseline in the same rounds."""
    if unknown := set(rows or ()) - ROWS.keys():
        raise typer.BadParameter(f"{', '.join(unknown)}: choose of {', '.join(ROWS)}")
    if shown:
        results = read_results(shown)
    else:
        torch.set_num_threads(min(threads, available_cpus()))
        results = measure(rows or list(ROWS), quick)
        write_results(json, results)
    if as_markdown:
        print(markdown(results))
    else:
        console.print(table(results))
    for warning in results.warnings:
        messages.print(f"[bold red]unreliable[/]: {warning}", soft_wrap=True)
    if plot:
        from benchmarks.chart import draw

        draw(results, plot)


def measure(names: list[str], quick: bool) -> Results:
    """Measure rows one after another, showing progress."""
    machine, start = describe_machine(), perf_counter()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    case = CASES["omniglot-5way"]
    engine = Work(case.settings, case.image_shape).engines["auto"].name  # builds what is built
    measured: list[Row] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=messages,
        transient=True,
        disable=not messages.is_terminal,
    ) as bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            bar.update(task, description=name)
            others, begin = OtherWork(), perf_counter()
            row = ROWS[name](QUICK if quick else FULL)
            seconds = perf_counter() - begin
            measured.append(row.model_copy(update={"others": others.share(), "seconds": seconds}))
            bar.advance(task)
            messages.print(f"{name}: measured in {seconds:.0f} s", highlight=False)
    return Results(
        machine=machine,
        engine=engine,
        started=started,
        seconds=perf_counter() - start,
        quick=quick,
        rows=tuple(measured),
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(f"error: {error}")
