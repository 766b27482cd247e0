"""Who made this recording? Persons that training has not seen, one or five recordings of each.

    pip install --no-deps aeon
    python -m experiments.signals

PickupGestureWiimoteZ: ten persons pick up a remote control, and its acceleration is recorded.
JapaneseVowels: nine speakers say two vowels, as twelve coefficients over time. In each fold some
persons are held out; all rows are measured on the same episodes of them.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import typer
from scipy.stats import t as student

import reptile
from experiments import keep, kept, run
from reptile.data.dataset import PreparedData
from reptile.data.prepare import prepare
from reptile.errors import InputError
from reptile.evaluate import evaluate
from reptile.files import write_json
from reptile.minibatches import IntArray
from reptile.settings import EvaluateSettings, PrepareSettings, TrainSettings, second_learner
from reptile.tasks import Task

OUTPUT = Path("artifacts/signals")
SHOTS = (1, 5)
QUERIES = 5
BANDS = 4  # of the spectrum, each twice as wide as the one before
SPLITS = 3  # ways to cut the persons into folds

Array = npt.NDArray[np.float64]


Rule = Callable[[Task], float]
"""A simple classifier: from a task to the share of its queries that it gets right."""


class Study(NamedTuple):
    """A set of recordings, and how it is cut."""

    name: str
    samples: int  # of a recording after resampling
    folds: int  # of each cut; a fold's persons are the classes of its tasks


STUDIES = (Study("PickupGestureWiimoteZ", 64, 2), Study("JapaneseVowels", 24, 3))
LEARNERS = {
    "reptile": "Reptile",
    "protonet": "trained through prototypes",
    "ridge": "trained through ridge",
}
ROWS = {
    "nearest_mean": "raw signal, nearest mean",
    "warping": "raw signal, nearest by time warping",
    "features": "hand-made features, nearest prototype",
    "random_prototypes": "untrained network, nearest prototype",
    "random": "untrained network, the same steps",
    "prototypes": "Reptile's features, no adaptation",
    **LEARNERS,
}
REFERENCE = "nearest_mean"  # whose difference to each row is shown


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Sets; all by default.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="aeon's folder datasets/data, instead of the package.")
    ] = None,
    splits: Annotated[int, typer.Option(min=1, help="Ways to cut the persons.")] = SPLITS,
    iterations: Annotated[int, typer.Option(min=1, help="Of training.")] = 500,
    tasks: Annotated[int, typer.Option(min=2, help="To test on, in each fold.")] = 100,
    output: Annotated[Path, typer.Option(help="Folder for data and results.")] = OUTPUT,
) -> None:
    """Compare the learners on each set. A fold that is done is not run again."""
    studies = [study for study in STUDIES if not names or study.name in names]
    if unknown := set(names or ()) - {study.name for study in studies}:
        known = ", ".join(study.name for study in STUDIES)
        raise InputError(f"no set {min(unknown)!r}; there are {known}")
    asked = {"iterations": iterations, "tasks": tasks}
    results: dict[str, list[Mapping[str, Any]]] = {}
    for study in studies:
        source = make_arrays(study, data or _package(), output)
        for split in range(splits):
            for fold in range(study.folds):
                file = output / "folds" / f"{study.name}-{split}-{fold}.json"
                if (found := kept(file, asked)) is None:
                    prepared = _prepare(study, source, split, fold, output)
                    accuracy = _measure(prepared, iterations, tasks)
                    found = keep(file, asked, {"accuracy": accuracy})
                results.setdefault(study.name, []).append(found["accuracy"])
    print("\n\n".join(_printed(name, folds) for name, folds in results.items()))


def _package() -> Path:
    """Return the folder of aeon's data; the package is found, not imported."""
    found = find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise InputError("the recordings are in a package: pip install --no-deps aeon")
    return Path(found.submodule_search_locations[0]) / "datasets/data"


def make_arrays(study: Study, folder: Path, output: Path) -> Path:
    """Write the recordings as a file of arrays: inputs [N, channels + 1, samples], and labels.

    Each recording is resampled to one length; the last channel is its duration.
    """
    inputs, labels = [], []
    for part in ("TRAIN", "TEST"):
        for series, label in read_ts(folder / study.name / f"{study.name}_{part}.ts"):
            inputs.append(resample(series, study.samples))
            labels.append(f"person {label}")
    path = output / f"{study.name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, inputs=np.asarray(inputs, np.float32), labels=labels)
    return path


def read_ts(path: Path) -> list[tuple[Array, str]]:
    """Read a file of the time-series archive: a line is channels separated by colons, and a label.

    Returns:
        a series [channels, time] and its label for each line.

    Raises:
        InputError: no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name aeon's folder datasets/data") from None
    rows = [line.split(":") for line in lines if line and line[0] not in "#@"]
    return [
        (np.array([channel.split(",") for channel in channels], np.float64), label.strip())
        for *channels, label in rows
    ]


def resample(series: Array, samples: int) -> Array:
    """Return a series [C, T] at evenly spaced times, and its length / 100 as one more channel."""
    length = series.shape[1]
    times = np.linspace(0, length - 1, samples)
    channels = [np.interp(times, np.arange(length), channel) for channel in series]
    return np.array([*channels, np.full(samples, length / 100)])


def _prepare(study: Study, source: Path, split: int, fold: int, output: Path) -> PreparedData:
    """Prepare the recordings with a part of the persons for testing, and none for validation."""
    with np.load(source) as arrays:
        persons = np.random.default_rng(split).permutation(np.unique(arrays["labels"]))
    held_out = output / "prepared" / f"{study.name}-{split}-{fold}.json"
    write_json(held_out, {"test": persons[fold :: study.folds].tolist()})
    settings = PrepareSettings(
        source=str(source), cross_domain=(), held_out=str(held_out), images_per_class=10
    )
    return prepare(settings, held_out.with_suffix(""))


def training(ways: int, iterations: int) -> dict[str, TrainSettings]:
    """Return how each learner is trained, to tell `ways` persons apart."""
    common = {
        "ways": ways,
        "model": {"name": "conv1d", "filters": 32},
        "meta_iterations": iterations,
        "checkpoint_every": iterations,
        "validation_tasks": 2,
    }
    steps = {
        "train_shots": 10,
        "inner_steps": 5,
        "inner_batch": 10,
        "meta_batch": 5,
        "optimizer": {"learning_rate": 0.001},
    }
    episode = {"meta_batch": 1, "episode": {"shots": list(SHOTS), "queries": QUERIES}}
    special = {"reptile": steps, "protonet": episode, "ridge": episode}
    return {
        name: TrainSettings.model_validate(common | {"algorithm": name} | special[name])
        for name in LEARNERS
    }


def _measure(data: PreparedData, iterations: int, tasks: int) -> dict[str, dict[str, float]]:
    """Return each row's mean accuracy at each number of shots."""
    ways, trainable = (len(data.split(name).starts) for name in ("test", "train"))
    checkpoints = {
        name: reptile.train(data, settings).checkpoint
        for name, settings in training(min(ways, trainable), iterations).items()
    }
    settings = EvaluateSettings(tasks=tasks, shots=SHOTS, queries=QUERIES, ways=ways)
    first = checkpoints.pop("reptile")
    beside = {second_learner(name): each for name, each in checkpoints.items()}
    found = evaluate(settings, first, data, {}, beside=beside)
    methods = {"reptile": "trained"} | {name: second_learner(name) for name in checkpoints}
    simple = {"features": _nearest_prototype(data), "warping": _nearest_by_warping(data)}
    results: dict[str, dict[str, float]] = {name: {} for name in ROWS}
    for measured in found.held_out:
        for name in ROWS:
            if name in simple:
                right = np.mean([simple[name](task) for task in measured.tasks])
            else:
                right = measured.scores(methods.get(name, name), "frozen").mean()
            results[name][str(measured.shots)] = float(right)
    return results


def hand_made(signals: Array) -> Array:
    """Return of each channel the mean, deviation, mean step and log energy in bands, [N, D].

    Args:
        signals: [N, channels, samples].
    """
    spectrum = np.abs(np.fft.rfft(signals - signals.mean(2, keepdims=True))) ** 2
    edges = np.geomspace(1, spectrum.shape[2], BANDS + 1).round().astype(int)
    bands = [spectrum[..., a:b].sum(2) for a, b in pairwise(edges)]
    steps = np.abs(np.diff(signals)).mean(2)
    parts = [signals.mean(2), signals.std(2), steps, *(np.log(band + 1e-6) for band in bands)]
    return np.concatenate(parts, 1)


def _nearest_prototype(data: PreparedData) -> Rule:
    """Classify by the nearest mean of hand-made features, scaled as in training."""
    features = hand_made(np.asarray(data.images, np.float64))
    seen = features[_training_rows(data)]
    features = (features - seen.mean(0)) / np.maximum(seen.std(0), 1e-6)

    def right(task: Task) -> float:
        support, query = features[task.support], features[task.query]
        labels = np.unique(task.support_targets)
        means = [support[task.support_targets == label].mean(0) for label in labels]
        distance = ((query[:, None] - np.array(means)) ** 2).sum(2)
        return float(np.mean(distance.argmin(1) == task.query_targets))

    return right


def _nearest_by_warping(data: PreparedData) -> Rule:
    """Classify by the nearest recording under dynamic time warping, channels scaled likewise."""
    signals = np.asarray(data.images, np.float64)
    seen = signals[_training_rows(data)]
    deviation = np.maximum(seen.std((0, 2), keepdims=True), 1e-6)
    signals = (signals - seen.mean((0, 2), keepdims=True)) / deviation
    split = data.split("test")
    rows = _rows(split.starts, split.counts)
    first, second = np.triu_indices(len(rows), 1)
    table = np.zeros((len(signals), len(signals)))
    for part in np.array_split(np.arange(len(first)), max(1, len(first) // 1000)):
        a, b = rows[first[part]], rows[second[part]]
        table[a, b] = table[b, a] = warped_distance(signals[a], signals[b])

    def right(task: Task) -> float:
        nearest = table[task.query[:, None], task.support].argmin(1)
        return float(np.mean(task.support_targets[nearest] == task.query_targets))

    return right


def warped_distance(a: Array, b: Array) -> Array:
    """Return the cost [P] of the cheapest alignment of signals a and b, [P, channels, samples].

    Dynamic time warping (Sakoe and Chiba 1978) of squared distances, without a window.
    """
    cost = ((a[:, :, :, None] - b[:, :, None]) ** 2).sum(1)
    pairs, times, others = cost.shape
    best = np.full((times + 1, others + 1, pairs), np.inf)
    best[0, 0] = 0
    for i in range(times):
        for j in range(others):
            before = np.minimum(np.minimum(best[i, j], best[i, j + 1]), best[i + 1, j])
            best[i + 1, j + 1] = before + cost[:, i, j]
    return np.asarray(best[-1, -1])


def _training_rows(data: PreparedData) -> IntArray:
    split = data.split("train")
    return _rows(split.starts, split.counts)


def _rows(starts: IntArray, counts: IntArray) -> IntArray:
    return np.concatenate([np.arange(a, a + n) for a, n in zip(starts, counts, strict=True)])


def _printed(name: str, folds: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """Return a set's accuracies as a table in Markdown: means of the folds, with 95 % intervals."""
    titles = [f"{shots}-shot | difference" for shots in SHOTS]
    lines = [f"| {name} | {' | '.join(titles)} |", "|---" * (1 + 2 * len(SHOTS)) + "|"]
    for row, title in ROWS.items():
        cells = []
        for shots in map(str, SHOTS):
            values, others = (
                np.array([fold[each][shots] for fold in folds]) for each in (row, REFERENCE)
            )
            cells += [interval(values), "" if row == REFERENCE else interval(values - others, "+")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(values: Array, sign: str = "") -> str:
    """Return the mean of some folds in %, and half of its 95 % interval by Student's t."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{100 * values.mean():{sign}.1f} ± {100 * half:.1f}"


if __name__ == "__main__":
    run(main)
