"""Learners trained on one dataset within the same budget, and measured on the same test tasks.

Each learner and seed is a cell with a folder of its own; a finished cell is not trained again.
Training and measuring are those of the stages `train` and `evaluate`.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from reptile import stages
from reptile.cpus import available_cpus
from reptile.data.dataset import INDEX_FILE, PreparedData, load_prepared
from reptile.errors import InputError, StoppedError
from reptile.evaluate.measure import evaluate
from reptile.evaluate.metrics import Score
from reptile.evaluate.report.charts import Line, axis, line_chart
from reptile.experiments.comparisons import ComparisonFile
from reptile.files import atomic_file, write_json
from reptile.learn.checkpoint import load_checkpoint
from reptile.learn.run import run_training
from reptile.learn.train import Progress
from reptile.objectives import objective_of
from reptile.provenance import code_sha256, settings_sha256
from reptile.settings import EvaluateSettings, TrainSettings

Reported = Callable[[str, int, int], None]
"""Called with the current step, the number done and the total."""

CELL_FILE = "cell.json"
POINTS = 10  # of a learning curve
TRIAL_SHARE, TRIAL_MOST = 0.1, 5.0  # of the budget, and seconds, to find the speed of training
PALETTE = ("#2a6f97", "#d1495b", "#3a7d44", "#8e5ea2", "#e08e0b", "#5b5b5b", "#17a2b8", "#a0522d")


class Budget(NamedTuple):
    """What each training may use: seconds, or gradient evaluations."""

    seconds: float | None
    gradients: int | None

    def __str__(self) -> str:
        """Return it for people."""
        if self.gradients is not None:
            return f"{self.gradients:,} gradient evaluations"
        return f"{self.seconds:g} s of training"


def gradients_of(settings: TrainSettings) -> int:
    """Return the gradient evaluations of a meta-iteration.

    One is the gradient of the loss of one mini-batch, or of one task's queries. MAML differentiates
    each inner step once more.
    """
    if settings.algorithm == "pretrain":
        return 1
    if settings.closed_form:
        return settings.meta_batch
    if settings.second_order:
        return settings.meta_batch * (2 * settings.inner_steps + 1)
    return settings.meta_batch * settings.inner_steps


def compare(
    comparison: ComparisonFile,
    learners: Sequence[str],
    seeds: int,
    budget: Budget,
    folder: Path,
    *,
    data: str | None = None,
    on_progress: Reported = lambda what, done, total: None,
) -> str:
    """Train and measure each learner with each seed.

    Writes `result.json`, `result.md` and `curves.svg`.

    Args:
        comparison: the settings.
        learners: which of its learners; empty for all that fit the data.
        seeds: how many training seeds, from 0 on. The test tasks are the same for all.
        budget: of each training.
        folder: where everything goes: `prepared`, and a folder for each cell.
        data: a prepared folder, or another source than the file's.
        on_progress: called with the progress.

    Returns:
        The table.

    Raises:
        InputError: a learner is unknown, the budget is too small for a meta-iteration, or whatever
            the stages refuse.
    """
    names = list(learners or comparison.learners)
    for name in names:
        if name not in comparison.learners:
            raise InputError(
                f"--learner {name}: there is none of this name; use "
                f"{', '.join(comparison.learners)}"
            )
        comparison.training(name)  # all settings are checked before any training
        comparison.evaluation(name)
    if (budget.seconds is None) == (budget.gradients is None):
        raise InputError("give one budget: --seconds or --gradients")
    prepared = _prepared(comparison, folder, data, on_progress)
    cells = [
        _cell(comparison, name, seed, budget, prepared, folder, on_progress)
        for name in names
        for seed in range(seeds)
    ]
    source = load_prepared(prepared)
    text = markdown(comparison, source, cells, budget)
    write_json(folder / "result.json", {"budget": budget._asdict(), "cells": cells})
    for name, content in (("result.md", text), ("curves.svg", curves(source, cells))):
        with atomic_file(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return text


def _prepared(
    comparison: ComparisonFile, folder: Path, data: str | None, on_progress: Reported
) -> Path:
    if data is not None and (Path(data) / INDEX_FILE).is_file():
        return Path(data)
    settings, prepared = comparison.prepare, folder / "prepared"
    if data is not None:
        settings = settings.model_copy(update={"source": data})
    wanted = settings.model_dump(mode="json")
    if not (prepared / INDEX_FILE).is_file() or load_prepared(prepared).index.settings != wanted:
        stages.prepare(
            settings, prepared, lambda done, total: on_progress("preparing", done, total)
        )
    return prepared


def _cell(
    comparison: ComparisonFile,
    name: str,
    seed: int,
    budget: Budget,
    prepared: Path,
    folder: Path,
    on_progress: Reported,
) -> dict[str, Any]:
    """Return a cell, trained and measured if it was not before."""
    data, label = load_prepared(prepared), f"{name}, seed {seed}"
    training, evaluation = comparison.training(name, seed=seed), comparison.evaluation(name)
    steps = (evaluation.steps,) if training.closed_form else comparison.steps or (evaluation.steps,)
    cell = folder / name / f"seed-{seed}"
    identity = settings_sha256(
        {
            "train": training.model_dump(mode="json"),
            "evaluate": evaluation.model_dump(mode="json"),
            "protocol": [comparison.ways, list(steps), comparison.mode],
            "budget": budget._asdict(),
            "data": [data.content_sha256, data.splits_sha256],
            "code": code_sha256("train", "evaluate"),
        }
    )
    done = _read(cell / CELL_FILE)
    if done and done["identity"] == identity:
        return done
    iterations = _iterations(training, data, budget, label, on_progress)
    training = training.model_copy(
        update={
            "meta_iterations": iterations,
            "checkpoint_every": max(1, iterations // POINTS),
        }
    )
    values = _train(training, prepared, cell, label, on_progress)
    values |= {
        "identity": identity,
        "learner": name,
        "seed": seed,
        "train": training.model_dump(mode="json"),
        "evaluate": evaluation.model_dump(mode="json"),
        "closed_form": training.closed_form,
        "scores": _scores(comparison, evaluation, steps, prepared, cell, label, on_progress),
    }
    write_json(cell / CELL_FILE, values)
    return values


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return values


def _iterations(
    settings: TrainSettings, data: PreparedData, budget: Budget, label: str, on_progress: Reported
) -> int:
    """Return the meta-iterations that a budget allows; of seconds, after a short trial."""
    each = gradients_of(settings)
    if budget.gradients is not None:
        if budget.gradients < each:
            raise InputError(
                f"--gradients {budget.gradients}: a meta-iteration of {label} takes {each}; "
                "give more"
            )
        return budget.gradients // each
    assert budget.seconds is not None
    longest = min(TRIAL_MOST, TRIAL_SHARE * budget.seconds)
    times: list[float] = []
    endless = settings.model_copy(update={"meta_iterations": 10**9, "checkpoint_every": 10**9})
    try:
        run_training(
            endless,
            data,
            on_progress=lambda progress: times.append(perf_counter()),
            stop=lambda: len(times) > 3 and times[-1] - times[0] > longest,
        )
    except StoppedError:
        on_progress(f"{label}: trial", 1, 1)
    speed = (len(times) - 1) / (times[-1] - times[0])  # without the first, which warms up
    return max(1, int(budget.seconds * speed))


def _train(
    settings: TrainSettings, prepared: Path, cell: Path, label: str, on_progress: Reported
) -> dict[str, Any]:
    """Train into the cell's folder; return the curve, the time, the memory and the speed."""
    curve: list[dict[str, float]] = []
    each, engine, start = gradients_of(settings), "", perf_counter()

    def observe(progress: Progress) -> None:
        nonlocal engine
        engine = progress.engine
        if len(progress.curve) > len(curve):
            point = progress.curve[-1]
            curve.append(
                {
                    "gradients": point.iteration * each,
                    "seconds": round(perf_counter() - start, 2),
                    "score": point.score,
                }
            )
        on_progress(f"{label}: training", progress.iteration, progress.of)

    forget_peak_memory()
    stages.train(
        settings,
        prepared,
        cell / "checkpoint",
        curves=cell / "curves",
        work=cell / "training",
        on_progress=observe,
    )
    seconds = perf_counter() - start
    return {
        "curve": curve,
        "seconds": round(seconds, 1),
        "gradients": settings.meta_iterations * each,
        "tasks_per_second": round(settings.meta_batch * settings.meta_iterations / seconds, 1),
        "peak_memory": peak_memory(),
        "engine": engine,
        "cpus": available_cpus(),
    }


def _scores(
    comparison: ComparisonFile,
    settings: EvaluateSettings,
    steps: Sequence[int],
    prepared: Path,
    cell: Path,
    label: str,
    on_progress: Reported,
) -> dict[str, dict[str, list[float]]]:
    """Return each test task's score, by shots and steps."""
    checkpoint, data = load_checkpoint(cell / "checkpoint"), load_prepared(prepared)
    scores: dict[str, dict[str, list[float]]] = {}
    for number in steps:
        result = evaluate(
            settings.model_copy(update={"steps": number}),
            checkpoint,
            data,
            {},
            lambda done, total: on_progress(f"{label}: evaluating", done, total),
            ways=comparison.ways,
            baselines=False,
        )
        for each in result.held_out:
            found = each.scores("trained", comparison.mode)
            scores.setdefault(str(each.shots), {})[str(number)] = [round(x, 6) for x in found]
    return scores


def markdown(
    comparison: ComparisonFile, data: PreparedData, cells: Sequence[dict[str, Any]], budget: Budget
) -> str:
    """Return the table: a row for each learner, a column for each number of shots and steps."""
    objective, first = objective_of(data.values), cells[0]["learner"]
    names = list(dict.fromkeys(cell["learner"] for cell in cells))
    shots = list(cells[0]["scores"])
    steps = list(map(str, comparison.steps)) or [""]
    published = any(comparison.learners[name].published for name in names)
    columns = [(k, s) for k in shots for s in steps]
    head = ["learner"]
    for k, s in columns:
        what = f"{k}-shot{f', {s} steps' * bool(s)}"
        head += [what, f"less {first}, paired"]
    head += ["gradients", "tasks/s", "peak memory, MiB", *(["published"] * published)]
    lines = [_row(head), _row(["---"] * len(head))]
    for name in names:
        own = [cell for cell in cells if cell["learner"] == name]
        row = [f"`{name}`"]
        for k, s in columns:
            found, base = (_tasks(cells, each, k, s) for each in (name, first))
            row.append(f"**{objective.show(*Score.of(found))}**")
            row.append("–" if name == first else objective.show(*Score.of(found - base)))
        memory = [cell["peak_memory"] for cell in own if cell["peak_memory"]]
        row += [
            f"{np.mean([cell['gradients'] for cell in own]):,.0f}",
            f"{np.mean([cell['tasks_per_second'] for cell in own]):,.0f}",
            f"{max(memory) / 2**20:,.0f}" if memory else "–",
        ]
        row += [comparison.learners[name].published or "–"] * published
        lines.append(_row(row))
    seeds, tasks = len({cell["seed"] for cell in cells}), len(_tasks(cells, first, *columns[0]))
    what = "Accuracy, %" if data.values == 0 else "Mean squared error"
    notes = [
        f"{what}, of {tasks:,} test tasks of {data.name}, the same for all; ± is 1.96·s/√n over "
        f"tasks{f', each the mean of {seeds} training seeds' * (seeds > 1)}.",
        f"Budget: {budget} for each training, {cells[0]['cpus']} CPUs.",
    ]
    if data.values == 0:
        notes.append(f"Batch norm of learners of gradient steps: {comparison.mode}.")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _tasks(
    cells: Sequence[dict[str, Any]], name: str, shots: str, steps: str
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return each task's score [T], the mean over seeds; learners without steps have one."""
    scores = []
    for cell in cells:
        if cell["learner"] == name:
            by_steps = cell["scores"][shots]
            scores.append(by_steps.get(steps) or next(iter(by_steps.values())))
    return np.asarray(np.mean(scores, axis=0))


def curves(data: PreparedData, cells: Sequence[dict[str, Any]]) -> str:
    """Return an SVG of the learning curves over seconds and over gradient evaluations."""
    objective = objective_of(data.values)
    factor = 100 if data.values == 0 else 1
    names = list(dict.fromkeys(cell["learner"] for cell in cells))
    highest = max(factor * point["score"] for cell in cells for point in cell["curve"])
    vertical = axis(objective.title, 100.0 if data.values == 0 else highest)
    charts = []
    for place, what in enumerate(("seconds", "gradients")):
        lines = [
            Line(
                cell["learner"] if cell["seed"] == 0 else "",
                f"learner-{names.index(cell['learner'])}",
                [point[what] for point in cell["curve"]],
                [factor * point["score"] for point in cell["curve"]],
            )
            for cell in cells
        ]
        horizontal = axis(what, max(max(line.x) for line in lines))
        chart = line_chart(f"{objective.title} over {what}", lines, horizontal, vertical)
        charts.append(
            chart.replace("<svg ", f'<svg y="{300 * place}" width="480" height="290" ', 1)
        )
    style = "text{font:12px sans-serif;fill:#444}.line{fill:none;stroke-width:1.5}"
    style += ".grid{stroke:#ddd}.axis{stroke:#888}"
    for number in range(len(names)):
        colour = PALETTE[number % len(PALETTE)]
        style += f".line.learner-{number}{{stroke:{colour}}}"
        style += f".label.learner-{number},.dot.learner-{number}{{fill:{colour}}}"
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 590" width="480" height="590">'
        f'<style>{style}</style><rect width="480" height="590" fill="white"/>{"".join(charts)}'
        "</svg>\n"
    )


def forget_peak_memory() -> None:
    """Let the peak of this process's memory start anew; without effect where Linux is not."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int | None:
    """Return the peak of this process's memory in bytes; None where Linux is not."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
