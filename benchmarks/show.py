"""The one table, for a terminal and for a document. The picture is in `chart`."""

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from benchmarks.results import Line, Results
from benchmarks.timing import Spread

HEADINGS = ("what runs", "ms", "quartiles", "ratio", "quartiles", "target", "tasks/s")


def table(results: Results) -> Group:
    """Return the table for a terminal, with a description of its rows."""
    shown = Table(*HEADINGS, title=_heading(results), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in shown.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for row in results.rows:
        shown.add_row(f"[bold]{row.name}[/]" + (" [red]disturbed[/]" if row.disturbed else ""))
        for line in row.lines:
            style = "red" if line.within_limit is False else ""
            shown.add_row(f"  {line.label}", *_cells(line), style=style)
        shown.add_section()
    titles = [f"[bold]{row.name}[/] {row.title}" for row in results.rows]
    return Group(shown, *titles, _caption(results))


def markdown(results: Results) -> str:
    """Return the same table in Markdown, with the machine and the warnings below it."""
    lines = [
        "| | what runs | " + " | ".join(HEADINGS[1:]) + " |",
        "|---|---|" + "--:|" * len(HEADINGS[1:]),
    ]
    for row in results.rows:
        titles = [f"**{row.name}** {row.title}"] + [""] * (len(row.lines) - 1)
        for title, line in zip(titles, row.lines, strict=True):
            lines.append(f"| {title} | {line.label} | " + " | ".join(_cells(line)) + " |")
    lines += ["", _heading(results) + ". " + _caption(results)]
    lines += [f"\n**Unreliable**: {warning}." for warning in results.warnings]
    return "\n".join(lines)


def _heading(results: Results) -> str:
    machine = results.machine
    return f"{machine.cpu}, {machine.cpus} CPUs, {machine.threads} threads"


def _caption(results: Results) -> str:
    machine = results.machine
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    commit = (machine.commit or "unknown")[:10] + (" with changes" if machine.changed else "")
    return (
        f"auto: {results.engine}; {versions}; commit {commit}; {results.started}, "
        f"{results.seconds:.0f} s; load average before {machine.load_average[0]:.1f}. "
        "Medians over rounds; ratios are medians of the rounds' ratios."
    )


def _cells(line: Line) -> tuple[str, ...]:
    ratio = line.ratio
    limit = ""
    if line.limit is not None:
        sign = "≥" if line.comparison == "speed" else "≤"
        limit = f"{sign} {_ratio(line, line.limit)} {'✓' if line.within_limit else '✗'}"
    rate = line.tasks_per_second
    return (
        _number(line.time.median),
        _range(*(_number(value) for value in (line.time.low, line.time.high))),
        _ratio(line, ratio.median) if ratio else "",
        _quartiles(line, ratio) if ratio else "",
        limit,
        f"{rate:,.0f}" if rate else "",
    )


def _ratio(line: Line, value: float) -> str:
    return f"{100 * value:.1f} %" if line.comparison == "share" else f"{value:.2f}×"


def _quartiles(line: Line, ratio: Spread) -> str:
    if line.comparison == "share":
        return _range(f"{100 * ratio.low:.1f}", f"{100 * ratio.high:.1f}")
    return _range(f"{ratio.low:.2f}", f"{ratio.high:.2f}")


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} - {high}"


def _number(milliseconds: float) -> str:
    digits = 0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2
    return f"{milliseconds:,.{digits}f}"
