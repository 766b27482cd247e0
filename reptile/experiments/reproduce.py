"""A published experiment over several training seeds, and a table with the published result.

Runs the stages `prepare`, `train` and `evaluate` in a separate folder, and reuses results there: a
finished seed is not trained again, an interrupted one resumes. No export.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from scipy import stats

from reptile import stages
from reptile.data.dataset import INDEX_FILE, PreparedData, load_prepared
from reptile.evaluate.metrics import Metrics, Score, read_metrics
from reptile.experiments.cells import Reported, Training, trained
from reptile.experiments.presets import Preset, changes
from reptile.files import atomic_file, write_json
from reptile.learn.checkpoint import CurvePoint, load_checkpoint
from reptile.objectives import objective_named
from reptile.provenance import code_sha256, versions
from reptile.settings import (
    BATCH_NORM_MODES,
    BatchNormMode,
    EvaluateSettings,
    PrepareSettings,
    Settings,
)

RUN_ONLY_SETTINGS = ("train.seed", "train.device", "train.engine", "train.checkpoint_every")
"""Settings that may differ from the preset's without making another experiment."""


@dataclass(frozen=True)
class Seed:
    """One training run and its evaluation."""

    seed: int
    training: Training
    curve: tuple[CurvePoint, ...]
    metrics: Metrics


@dataclass(frozen=True)
class Reproduction:
    """All seeds of one experiment."""

    preset: Preset
    settings: Settings  # `train.seed` is the first of the seeds
    data: PreparedData
    seeds: tuple[Seed, ...]

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from the preset, as (here, in the preset)."""
        differing = changes(self.settings, self.preset.settings)
        return {
            name: values
            for name, values in differing.items()
            if name not in RUN_ONLY_SETTINGS and not name.startswith(("export.", "verify."))
        }

    @property
    def scaled_down(self) -> bool:
        """Whether less was trained or tested than the preset says."""
        here, there = self.settings, self.preset.settings
        return (
            here.train.meta_iterations < there.train.meta_iterations
            or here.evaluate.tasks < there.evaluate.tasks
        )

    @property
    def modes(self) -> tuple[BatchNormMode, ...]:
        """The modes to show: without batch norm all three are the same."""
        return BATCH_NORM_MODES if self.settings.train.model.name == "conv4" else ("frozen",)


def reproduce(
    preset: Preset,
    settings: Settings,
    seeds: int,
    folder: Path,
    *,
    data: str | None = None,
    on_progress: Reported = lambda what, done, total: None,
) -> Reproduction:
    """Train and evaluate a preset for several seeds; write `result.json` and `result.md`.

    Args:
        preset: what is reproduced.
        settings: its settings, some of them perhaps changed.
        seeds: how many training seeds, from `settings.train.seed` on. The test tasks are those of
            `settings.evaluate.seed` for every one of them.
        folder: where everything goes: `prepared`, and a folder for each seed.
        data: another source of images than the preset's; or a prepared folder, with its
            settings of `prepare`.
        on_progress: called with the progress.

    Raises:
        InputError: whatever the stages refuse.
    """
    if data is not None and (Path(data) / INDEX_FILE).is_file():
        prepared = Path(data)
        used = PrepareSettings.model_validate(load_prepared(prepared).index.settings)
        settings = settings.model_copy(update={"prepare": used})
    else:
        prepared = folder / "prepared"
        if data is not None:
            source = settings.prepare.model_copy(update={"source": data})
            settings = settings.model_copy(update={"prepare": source})
        _prepare(settings, prepared, on_progress)
    images = load_prepared(prepared)
    done = []
    for number in range(seeds):
        seed = settings.train.seed + number
        seed_settings = settings.train.model_copy(update={"seed": seed})
        ours = settings.model_copy(update={"train": seed_settings})
        label = f"seed {number + 1} of {seeds}"
        done.append(_seed(ours, images, prepared, folder / f"seed-{seed}", label, on_progress))
    result = Reproduction(preset, settings, images, tuple(done))
    write_json(folder / "result.json", as_json(result))
    with atomic_file(folder / "result.md") as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")
    return result


def over_seeds(means: Sequence[float]) -> Score:
    """Return the mean and half its 95 % interval: Student's t with n - 1 degrees, n >= 2."""
    number = len(means)
    mean = sum(means) / number
    variance = sum((value - mean) ** 2 for value in means) / (number - 1)
    return Score(mean, float(stats.t.ppf(0.975, number - 1)) * math.sqrt(variance / number))


def markdown(result: Reproduction) -> str:
    """Return the table with the published result, and how it was made."""
    seeds, paper = result.seeds, result.preset.paper
    show = objective_named(seeds[0].metrics.objective).show
    several = len(seeds) > 1
    ours = f"mean of {len(seeds)} seeds ± 95 %" if several else f"seed {seeds[0].seed} ± 95 %"
    head = ["data", "batch norm", f"{ours}{', scaled down' * result.scaled_down}"]
    head += [f"seed {seed.seed}" for seed in seeds if several]
    head += ["random start", "published"]
    lines = [_row(head), _row(["---"] * len(head))]
    for dataset, shots, mode, scores in _rows(result):
        metrics = seeds[0].metrics
        published = (dataset, shots) == (metrics.held_out, metrics.fewest_shots)
        cells = [
            f"{dataset}, {shots}-shot",
            mode.replace("_", "-") if len(result.modes) > 1 else "none",
            f"**{show(*_joint(scores))}**",
        ]
        cells += [show(*score) for score in scores if several]
        cells += [
            show(*metrics.score(dataset, shots, "random", mode)),
            (published and paper.show(mode)) or "–",
        ]
        lines.append(_row(cells))
    title = f"### {result.preset.name}" + (f": {paper.row}" if paper.row else "")
    return "\n".join([title, "", *lines, "", *_notes(result)]) + "\n"


def as_json(result: Reproduction) -> dict[str, Any]:
    """Return everything as plain values."""
    joint: dict[str, Any] = {}
    for dataset, shots, mode, scores in _rows(result):
        by_mode = joint.setdefault(dataset, {}).setdefault(str(shots), {})
        by_mode[mode] = asdict(_joint(scores))
    stages_run = {"prepare", "train", "evaluate"}
    return {
        "preset": result.preset.name,
        "paper": result.preset.paper.model_dump(mode="json"),
        "settings": result.settings.model_dump(mode="json", include=stages_run),
        "changed": [
            {"setting": name, "here": here, "preset": there}
            for name, (here, there) in result.changes.items()
        ],
        "data_sha256": result.data.content_sha256,
        "splits_sha256": result.data.splits_sha256,
        "code_sha256": code_sha256("prepare", "train", "evaluate"),
        "versions": versions("torch", "numpy"),
        "over_seeds": joint,
        "seeds": [
            {
                "seed": seed.seed,
                "training": seed.training.model_dump(mode="json"),
                "curve": [point.model_dump(mode="json") for point in seed.curve],
                "metrics": seed.metrics.model_dump(mode="json"),
            }
            for seed in result.seeds
        ],
    }


def _rows(result: Reproduction) -> Iterator[tuple[str, int, BatchNormMode, list[Score]]]:
    """Yield dataset, shots, mode and the scores of every seed."""
    for dataset, by_shots in result.seeds[0].metrics.scores.items():
        for shots in by_shots:
            for mode in result.modes:
                scores = [s.metrics.score(dataset, shots, "trained", mode) for s in result.seeds]
                yield dataset, shots, mode, scores


def _prepare(settings: Settings, prepared: Path, on_progress: Reported) -> None:
    """Prepare the data unless the same settings have done so already."""
    wanted = settings.prepare.model_dump(mode="json")
    if (prepared / INDEX_FILE).is_file() and load_prepared(prepared).index.settings == wanted:
        return
    stages.prepare(
        settings.prepare, prepared, lambda done, total: on_progress("preparing", done, total)
    )


def _seed(
    settings: Settings,
    data: PreparedData,
    prepared: Path,
    folder: Path,
    label: str,
    on_progress: Reported,
) -> Seed:
    checkpoint, evaluation = folder / "checkpoint", folder / "evaluation"
    training = trained(settings.train, data, prepared, folder, f"{label}: training", on_progress)
    if not _evaluated(settings, evaluation):
        stages.evaluate(
            settings.evaluate,
            prepared,
            checkpoint,
            evaluation,
            lambda done, total: on_progress(f"{label}: evaluating", done, total),
        )
    curve = load_checkpoint(checkpoint).info.curve
    return Seed(settings.train.seed, training, curve, read_metrics(evaluation))


def _evaluated(settings: Settings, evaluation: Path) -> bool:
    try:
        text = (evaluation / "settings.json").read_bytes()
        return EvaluateSettings.model_validate_json(text) == settings.evaluate
    except (FileNotFoundError, ValidationError):
        return False


def _notes(result: Reproduction) -> list[str]:
    """Return notes for the reader of the table."""
    train, test, seeds = result.settings.train, result.settings.evaluate, result.seeds
    what = "Accuracy in per cent" if seeds[0].metrics.metric == "accuracy" else "Mean squared error"
    queries = "query" if test.queries == 1 else "queries"
    notes = [
        f"{what}. Each seed: {test.tasks:,} test tasks of {test.queries} {queries} a class, "
        f"{test.steps} inner steps on batches of {test.batch}; ± is 1.96·s/√n over the tasks."
    ]
    if len(seeds) > 1:
        notes.append(
            f"Mean over training seeds: ± is Student's t interval of {len(seeds)} seeds; the test "
            "tasks are the same."
        )
    changed = [
        f"`{name}` {_plain(here)} (preset: {_plain(there)})"
        for name, (here, there) in result.changes.items()
    ]
    if changed:
        word = "Scaled down or changed" if result.scaled_down else "Changed"
        notes.append(f"{word}: {', '.join(changed)}.")
    for seed in seeds:
        part = seed.training
        suffix = f" (the part from iteration {part.first_iteration:,} on)" * bool(
            part.first_iteration
        )
        notes.append(
            f"Training seed {seed.seed}{suffix}: {part.seconds / 60:.1f} min, "
            f"{part.tasks_per_second:.0f} tasks/s ({part.engine}, {part.cpus} CPUs), "
            f"{train.meta_iterations:,} meta-iterations."
        )
    if result.preset.paper.source:
        notes.append(f"Published: {result.preset.paper.source}.")
    return [f"- {note}" for note in notes]


def _joint(scores: Sequence[Score]) -> Score:
    """Return the score over all seeds; of a single seed, that of its tasks."""
    return scores[0] if len(scores) == 1 else over_seeds([score.mean for score in scores])


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
