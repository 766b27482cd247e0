"""The picture: how many times as fast as eager, and how the speed scales."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from benchmarks.results import Line, Results, Row
from reptile.errors import InputError
from reptile.files import atomic_file

FAST, SLOW, LIMIT, FAINT = "#2a6f97", "#9aa5ad", "#c1440e", "#e3e6e8"
CURVES = {  # rows drawn as curves: titles of the panel and of its axes
    "tasks": ("Larger meta-batches", "tasks in a meta-batch", "tasks/s"),
    "image-size": ("Larger images", "side of the images, pixels", "tasks/s"),
    "sampling": ("Larger datasets", "images to draw from", "ms to draw 5 tasks"),
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SLOW,
}


def draw(results: Results, path: Path) -> None:
    """Draw bars of speed against eager, and curves where rows of `CURVES` were measured.

    Raises:
        InputError: the run has no row that this picture shows.
    """
    bars = [
        (row, line)
        for row in results.rows
        for line in row.lines
        if line.comparison == "speed" and line.ratio and "eager" in row.lines[0].label
        if not line.point
    ]
    curves = [row for row in results.rows if row.name in CURVES]
    if not bars and not curves:
        raise InputError("nothing to draw: measure a setting, or one of " + ", ".join(CURVES))
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(10, 6.8), layout="constrained")
        widths = [1.25] * bool(bars) + [1] * bool(curves)
        grid = figure.add_gridspec(max(1, len(curves)), len(widths), width_ratios=widths)
        if bars:
            _bars(figure.add_subplot(grid[:, 0]), bars)
        for number, row in enumerate(curves):
            _curves(figure.add_subplot(grid[number, -1]), row)
        machine = results.machine
        where = f"{machine.cpu}, {machine.threads} threads, torch {machine.versions['torch']}"
        spoiled = "; disturbed, unreliable" if results.warnings else ""
        figure.supxlabel(where + spoiled, fontsize=8, color=LIMIT if spoiled else "#555555")
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        pyplot.close(figure)


def _bars(axes: Axes, bars: Sequence[tuple[Row, Line]]) -> None:
    places, place, previous = [], 0.0, None
    for row, _ in bars:
        place += 1.0 if row.name == previous else 1.5  # a gap between rows
        places.append(place)
        previous = row.name
    spreads = [line.ratio for _, line in bars if line.ratio]
    values = [spread.median for spread in spreads]
    errors = [
        [spread.median - spread.low for spread in spreads],
        [spread.high - spread.median for spread in spreads],
    ]
    axes.barh(places, values, height=0.8, color=FAST)
    axes.errorbar(values, places, xerr=errors, fmt="none", ecolor="#0b2533", elinewidth=1.2)
    right = max(spread.high for spread in spreads)
    for (_, line), y, spread in zip(bars, places, spreads, strict=True):
        axes.text(right * 1.16, y, f"{spread.median:.1f}×", va="center", ha="right")
        if line.limit:
            axes.plot([line.limit] * 2, [y - 0.4, y + 0.4], color=LIMIT, linewidth=2)
    if any(line.limit for _, line in bars):
        axes.plot([], [], color=LIMIT, linewidth=2, label="target")
    axes.axvline(1, color=SLOW, linewidth=1, linestyle="--", label="eager PyTorch")
    labels = [
        f"{row.name}, {line.label.removeprefix('auto').lstrip(', ')}".rstrip(", ")
        for row, line in bars
    ]
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(place + 1.6, 0.7)  # room for the legend
    axes.set_xlim(0, right * 1.16)
    axes.set_title("Speed, times eager PyTorch on the same work")
    axes.set_xlabel("median of paired ratios; whiskers: quartiles")
    axes.legend(frameon=False, loc="lower right", ncols=2)


def _curves(axes: Axes, row: Row) -> None:
    title, across, up = CURVES[row.name]
    curves: dict[str, list[tuple[float, Line]]] = {}
    for line in row.lines:
        if line.point:
            curves.setdefault(line.point.curve, []).append((line.point.x, line))
    drawn = {name: points for name, points in curves.items() if len(points) > 1}
    top = 0.0
    for name, points in drawn.items():
        spreads = [_scaled(line) for _, line in points]
        middle = [spread[1] for spread in spreads]
        errors = [[m - low for low, m, _ in spreads], [high - m for _, m, high in spreads]]
        colour = SLOW if name == "eager" else FAST
        axes.errorbar(
            [x for x, _ in points],
            middle,
            yerr=errors,
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
        )
        if len(drawn) > 1:
            axes.annotate(
                name,
                (points[-1][0], middle[-1]),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                color=colour,
            )
        top = max([top, *(spread[2] for spread in spreads)])
    axes.set_xscale("log")
    ticks = sorted({line.point.x for line in row.lines if line.point})
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
    if row.name == "image-size":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, top * 1.15)
    axes.grid(axis="y", color=FAINT)
    axes.set_axisbelow(True)
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel(up)


def _scaled(line: Line) -> tuple[float, float, float]:
    """Return quartiles in what the curve shows: tasks in a second, or milliseconds."""
    low, median, high = line.time
    if line.tasks is None:
        return low, median, high
    return line.tasks / high * 1e3, line.tasks / median * 1e3, line.tasks / low * 1e3
