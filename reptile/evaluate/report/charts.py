"""Line charts as inline SVG, coloured by the page's style sheet so that they follow its theme.

Only what the report needs: lines with interval bands, labelled at their ends.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 48, 102, 12, 46  # the margin on the right holds the lines' labels
LABEL_HEIGHT = 15


class Line(NamedTuple):
    """One line of a chart."""

    label: str  # empty for none
    style: str  # CSS classes
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[float] = ()  # half the height of the band at each point


class Dots(NamedTuple):
    """Points without a line between them."""

    style: str  # CSS classes
    radius: float
    x: Sequence[float]
    y: Sequence[float]


class Axis(NamedTuple):
    """One axis from `low` to `high`."""

    title: str
    high: float
    ticks: Sequence[float]
    unit: str = ""
    scale: Callable[[float], float] = float
    low: float = 0.0

    def place(self, value: float) -> float:
        """Return where a value lies, 0..1."""
        low = self.scale(self.low)
        return (self.scale(value) - low) / (self.scale(self.high) - low)


def axis(title: str, high: float) -> Axis:
    """Return a linear axis that reaches `high`, with at most six round ticks."""
    high = high or 1.0
    power = 10.0 ** math.floor(math.log10(high))
    step = next(s * power for s in (0.2, 0.5, 1.0, 2.0) if high <= 5 * s * power)
    return Axis(title, high, [step * i for i in range(int(high / step + 1e-9) + 1)])


def symmetric_axis(title: str, high: float) -> Axis:
    """Return a linear axis from -high to high, with round ticks."""
    half = axis(title, high)
    positive = half.ticks[1:] if len(half.ticks) < 5 else half.ticks[2::2]
    ticks = [*(-tick for tick in reversed(positive)), 0.0, *positive]
    return half._replace(ticks=ticks, low=-half.high)


def line_chart(
    what: str, lines: Sequence[Line], x: Axis, y: Axis, dots: Sequence[Dots] = ()
) -> Markup:
    """Draw lines over two axes.

    Args:
        what: description of the chart, for screen readers.
        lines: drawn in this order; a dot where a line has one point only.
        x: horizontal axis.
        y: vertical axis.
        dots: drawn over the lines.
    """

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x.place(value)

    def down(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(y.place(value), 0.0), 1.0)

    def path(xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in zip(xs, ys, strict=True))

    end, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(what)}">']
    for tick in y.ticks:
        height = f"{down(tick):.1f}"
        parts += [
            f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{height}" y2="{height}"/>',
            f'<text x="{LEFT - 7}" y="{height}" dy=".34em" text-anchor="end">'
            f"{tick:g}{escape(y.unit)}</text>",
        ]
    for tick in x.ticks:
        parts.append(
            f'<text x="{across(tick):.1f}" y="{floor + 17}" text-anchor="middle">{tick:g}</text>'
        )
    middle = (LEFT + end) / 2
    parts += [
        f'<line class="axis" x1="{LEFT}" x2="{end}" y1="{floor}" y2="{floor}"/>',
        f'<text class="title" x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x.title)}</text>",
    ]
    for line in lines:
        if line.intervals:
            upper = [a + b for a, b in zip(line.y, line.intervals, strict=True)]
            lower = [a - b for a, b in zip(line.y, line.intervals, strict=True)]
            around = path(line.x, upper) + " " + path(line.x[::-1], lower[::-1])
            parts.append(f'<polygon class="band {line.style}" points="{around}"/>')
    for line in lines:
        parts.append(f'<polyline class="line {line.style}" points="{path(line.x, line.y)}"/>')
        if len(line.x) == 1:
            parts.append(
                f'<circle class="dot {line.style}" r="3.5" '
                f'cx="{across(line.x[0]):.1f}" cy="{down(line.y[0]):.1f}"/>'
            )
    for group in dots:
        parts += [
            f'<circle class="{group.style}" r="{group.radius:g}" '
            f'cx="{across(a):.1f}" cy="{down(b):.1f}"/>'
            for a, b in zip(group.x, group.y, strict=True)
        ]
    labelled = [line for line in lines if line.label]
    places = _spread([down(line.y[-1]) for line in labelled])
    for line, place in zip(labelled, places, strict=True):
        parts.append(
            f'<text class="label {line.style}" x="{end + 7}" y="{place:.1f}" dy=".34em">'
            f"{escape(line.label)}</text>"
        )
    return Markup("".join([*parts, "</svg>"]))


def _spread(heights: Sequence[float]) -> list[float]:
    """Move labels apart until none overlaps, each as near to its line as the others allow."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _top(groups[-1], heights) < _top(groups[-2], heights) + (
            LABEL_HEIGHT * len(groups[-2])
        ):
            last = groups.pop()
            groups[-1] += last
    placed = list(heights)
    for group in groups:
        for number, index in enumerate(group):
            placed[index] = _top(group, heights) + LABEL_HEIGHT * number
    return placed


def _top(group: Sequence[int], heights: Sequence[float]) -> float:
    """Return the height of a group's first label when the group is centred on its lines."""
    centre = sum(heights[index] for index in group) / len(group)
    return centre - LABEL_HEIGHT * (len(group) - 1) / 2
