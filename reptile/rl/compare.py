"""Algorithms side by side on one family of tasks: returns before and after updates, with curves."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reptile.errors import InputError
from reptile.evaluate.metrics import Score
from reptile.evaluate.report.charts import Axis, Line, axis, line_chart
from reptile.experiments.compare import page
from reptile.experiments.reproduce import over_seeds
from reptile.files import atomic_file, write_json
from reptile.provenance import versions
from reptile.rl.settings import AlgorithmName, RLSettings
from reptile.rl.train import Point, Returns, measure, train
from reptile.tasks import Purpose

TEST_SEED = 1  # of the test tasks and their noise, the same for all algorithms and seeds


@dataclass(frozen=True)
class Row:
    """One algorithm."""

    settings: RLSettings  # its seed is the first
    returns: tuple[Returns, ...]
    """Of each seed, before and after each update, of each test task [updates + 1, tasks]."""
    curves: tuple[tuple[Point, ...], ...]

    def score(self, number: int) -> Score:
        """Return the return after so many updates: over the tasks of one seed, or over seeds."""
        found = [returns[number] for returns in self.returns]
        if len(found) == 1:
            return Score.of(found[0])
        return over_seeds([float(each.mean()) for each in found])


def compare(
    settings: RLSettings,
    algorithms: Sequence[AlgorithmName],
    seeds: int,
    folder: Path,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Row]:
    """Train every algorithm with every seed within the same budget of episodes; measure all.

    Writes `result.json`, `result.md` and `result.html`. A finished training is not done again, an
    interrupted one resumes.

    Args:
        settings: shared by all.
        algorithms: which.
        seeds: how many, from `settings.seed` on.
        folder: where everything goes.
        on_progress: called with what is trained, the meta-iterations done, and all of them.
    """
    if len(set(algorithms)) != len(algorithms):
        raise InputError("an algorithm is named twice; name each once")
    rows = []
    for name in algorithms:
        own = RLSettings.model_validate(settings.model_dump() | {"algorithm": name})
        returns, curves = [], []
        for seed in range(settings.seed, settings.seed + seeds):
            label = f"{name}, seed {seed}"
            trained = train(
                own.model_copy(update={"seed": seed}),
                folder / name / f"seed-{seed}",
                lambda done, total, label=label: on_progress(label, done, total),  # type: ignore[misc]
            )
            returns.append(
                measure(trained, Purpose.EVALUATE, own.test_tasks, own.test_updates, TEST_SEED)
            )
            curves.append(trained.run.curve)
        rows.append(Row(own, tuple(returns), tuple(curves)))
    write_json(folder / "result.json", as_json(rows))
    for suffix, text in (("md", markdown(rows)), ("html", html(rows))):
        with atomic_file(folder / f"result.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return rows


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Return everything as plain values."""
    return {
        "version": 1,
        "versions": versions("torch", "numpy", "gymnasium"),
        "algorithms": [
            {
                "settings": row.settings.model_dump(mode="json"),
                "returns": [asdict(row.score(i)) for i in range(row.settings.test_updates + 1)],
                "seeds": [
                    {
                        "returns": returns.mean(1).tolist(),
                        "curve": [point.model_dump(mode="json") for point in curve],
                    }
                    for returns, curve in zip(row.returns, row.curves, strict=True)
                ],
            }
            for row in rows
        ],
    }


def markdown(rows: Sequence[Row]) -> str:
    """Return the table."""
    header, body = _table(rows)
    lines = [header, ["---"] * len(header), *body]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", *(f"- {note}" for note in _notes(rows))]) + "\n"


def html(rows: Sequence[Row]) -> str:
    """Return a page with the table and the learning curves."""
    header, body = _table(rows)
    settings = rows[0].settings
    return page(
        dataset=settings.environment,
        budget=f"{settings.episodes:,} episodes",
        header=header,
        rows=body,
        notes=_notes(rows),
        charts=[
            ("Return on the new tasks, by update", _by_update(rows)),
            ("Return after the updates on validation tasks, in training", _curves(rows)),
        ],
    )


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    number = rows[0].settings.test_updates
    header = ["algorithm", "before", *(f"{i} update{'s' * (i > 1)}" for i in range(1, number + 1))]
    header.append("meta-iterations")
    return header, [
        [
            row.settings.algorithm,
            *(_shown(row.score(i)) for i in range(number + 1)),
            f"{row.settings.iterations:,}",
        ]
        for row in rows
    ]


def _shown(score: Score) -> str:
    return f"{score.mean:.2f} ± {score.interval:.2f}".replace("-", "\N{MINUS SIGN}")


def _notes(rows: Sequence[Row]) -> list[str]:
    settings, seeds = rows[0].settings, len(rows[0].returns)
    over = f"Student's t interval of {seeds} seeds" if seeds > 1 else "1.96·s/√n over the tasks"
    return [
        f"Undiscounted return on {settings.test_tasks} new tasks of {settings.environment}, the "
        f"mean of {settings.trajectories} trajectories; ± is {over}.",
        f"Each training had {settings.episodes:,} episodes; an update takes "
        f"{settings.trajectories} trajectories of the task.",
    ]


def _by_update(rows: Sequence[Row]) -> Any:
    numbers = range(rows[0].settings.test_updates + 1)
    lines = []
    for place, row in enumerate(rows):
        scores = [row.score(i) for i in numbers]
        lines.append(
            Line(
                row.settings.algorithm,
                f"line-{place % 8}",
                list(numbers),
                [score.mean for score in scores],
                [score.interval for score in scores],
            )
        )
    x = Axis("updates", max(numbers), list(numbers))
    return line_chart("return by update", lines, x, _returns_axis(lines))


def _curves(rows: Sequence[Row]) -> Any:
    lines = []
    for place, row in enumerate(rows):
        if not row.curves[0]:
            continue
        x = [point.episodes / 1000 for point in row.curves[0]]
        y = np.mean([[point.after for point in curve] for curve in row.curves], axis=0)
        lines.append(Line(row.settings.algorithm, f"line-{place % 8}", x, y.tolist()))
    if not lines:
        return ""
    x_axis = axis("thousand episodes of training", rows[0].settings.episodes / 1000)
    return line_chart(
        "return after the updates on validation tasks", lines, x_axis, _returns_axis(lines)
    )


def _returns_axis(lines: Sequence[Line]) -> Axis:
    """Return an axis with round ticks over all values, which may be negative."""
    low, high = (pick(pick(line.y) for line in lines) for pick in (min, max))
    width = max(high - low, 1e-6)
    step = axis("", width).ticks[1]
    first, last = int(np.floor(low / step)), int(np.ceil(high / step))
    ticks = [step * i for i in range(first, last + 1)]
    return Axis("return", ticks[-1], ticks, low=ticks[0])
