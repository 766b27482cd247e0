"""The bundle's MODEL_CARD.md, for readers who have the bundle without its project.

Everything in it comes from the manifest and the checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reptile.evaluate.methods import title
from reptile.evaluate.metrics import Metrics
from reptile.learn.checkpoint import CheckpointInfo
from reptile.objectives import CLASSIFICATION, REGRESSION
from reptile.settings import Adapt, LastBlocks

ARCHITECTURES = {
    "conv4": "four 3x3 convolutions of {filters} filters, {downsampling}, "
    "with batch norm and ReLU, and a linear head",
    "mlp": "hidden layers of {hidden} units with {activation}, and a linear head",
}
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh"}
DOWNSAMPLING = {"stride": "of stride 2", "pool": "each with 2x2 max-pooling"}
ALGORITHMS = {
    "reptile": "Reptile (Nichol, Achiam, Schulman: arXiv 1803.02999)",
    "fomaml": "first-order MAML (Nichol, Achiam, Schulman: arXiv 1803.02999)",
    "maml": "MAML (Finn, Abbeel, Levine: arXiv 1703.03400)",
    "proto-maml": "Proto-MAML (Triantafillou, Zhu, Dumoulin et al.: arXiv 1903.03096)",
    "anil": "ANIL (Raghu, Raghu, Bengio, Vinyals: arXiv 1909.09157)",
    "meta-sgd": "Meta-SGD (Li, Zhou, Chen, Li: arXiv 1707.09835)",
    "protonet": "nearest prototype (Snell, Swersky, Zemel: arXiv 1703.05175)",
    "ridge": "ridge regression (Bertinetto, Henriques, Torr, Vedaldi: arXiv 1805.08136)",
    "bayes": "Bayesian linear regression (Harrison, Sharma, Pavone: arXiv 1807.08912)",
    "pretrain": "none in training, a classifier of all training classes instead (Chen, Liu, Kira, "
    "Wang, Huang: arXiv 1904.04232)",
}


CLOSED_FORM = """\
A few-shot classifier that learns inside ONNX Runtime. Give it a few labelled examples of any
number of classes it has never seen (up to {ways}); it fits a linear classifier to their features in
closed form, without gradient steps, and then classifies further examples of these classes. A class
is added or removed later without the other classes' examples. Its network was trained through the
same head: {algorithm}.

| | |
|---|---|
| {inputs} |
| classes at once | up to {ways} |"""
CLASSIFIER = """\
A few-shot image classifier that learns inside ONNX Runtime. Give it a few labelled images of up
to {ways} classes it has never seen; it adapts to them in {steps} small optimiser
steps and then classifies further images of these classes. Its initialisation was meta-trained
with {algorithm}.

| | |
|---|---|
| {inputs} |
| classes at once | up to {ways} |"""
REGRESSOR = """\
A few-shot regressor that learns inside ONNX Runtime. Give it a few points of a function it has
never seen; it adapts to them in {steps} small optimiser steps and then predicts
the function's values elsewhere. Its initialisation was meta-trained with
{algorithm}.

| | |
|---|---|
| {inputs} |
| outputs | {outputs} |"""
CLOSED_FORM_REGRESSOR = """\
A few-shot regressor that learns inside ONNX Runtime. Give it a few points of a function it has
never seen; it fits a Bayesian linear regression to their features in closed form, without gradient
steps, and then predicts the function's values elsewhere, each with its variance. Its network was
trained through the same head: {algorithm}.

| | |
|---|---|
| {inputs} |
| outputs | {outputs} |"""
CLASSIFIER_USE = """from reptile.runtime import FewShotModel  # needs numpy and onnxruntime only

model = FewShotModel.load("path/to/this/folder")
adapted = model.adapt(images, labels)  # {dtype} [N, {shape}], one name each
names, probabilities = adapted.predict(more_images)"""
REGRESSOR_USE = """from reptile.runtime import FewShotRegressor  # needs numpy and onnxruntime only

model = FewShotRegressor.load("path/to/this/folder")
adapted = model.adapt(x, y)  # {dtype} [N, {shape}] and [N, {outputs}]
values = adapted.predict(more_x)"""
CLOSED_FORM_REGRESSOR_USE = """from reptile.runtime import FewShotRegressor  # numpy and onnxruntime

model = FewShotRegressor.load("path/to/this/folder")
adapted = model.adapt(x, y)  # {dtype} [N, {shape}] and [N, {outputs}]
values = adapted.predict(more_x)
low, high = adapted.predict_interval(more_x, level=0.95)"""
CLOSED_FORM_USE = """from reptile.runtime import FewShotModel  # needs numpy and onnxruntime only

model = FewShotModel.load("path/to/this/folder")
adapted = model.adapt(images, labels)  # {dtype} [N, {shape}], one name each
names, probabilities = adapted.predict(more_images)
adapted = adapted.add(images_of_a_new_class, new_labels)"""
CLOSED_FORM_LIMITS = """\
- For classifying images like those it was trained on, from one to {max_support} labelled examples
  in all.
- It always predicts one of the classes of the support set, also for an image of none of them.
- The probabilities are not calibrated.
- Accuracy may be low on images unlike the training data (see below); measure it first.
- Not for decisions about people.
- The given examples determine what is learnt; `finite` is false where an image was no number.\
"""
CLOSED_FORM_MEASURED = """\
Accuracy in % on new tasks of held-out classes and on other data, with 95 % intervals."""
CLASSIFIER_LIMITS = """\
- For classifying images of a few classes like those it was trained on, from one to
  {max_support} labelled examples in all; at most {max_steps} steps.
- It always predicts one of the classes of the support set, also for an image of none of them.
- The probabilities are not calibrated.
- Accuracy may be low on images unlike the training data (see below); measure it first.
- Not for decisions about people.
- The given examples determine what is learnt; `finite` is false where the numbers diverged.\
"""
REGRESSOR_LIMITS = """\
- For functions like those it was trained on, from one to {max_support} points in all; at most
  {max_steps} steps.
- It gives no uncertainty. Predictions outside the range of the training data are meaningless.
- The given points determine what is learnt; `finite` is false where the numbers diverged."""
CLOSED_FORM_REGRESSOR_LIMITS = """\
- For functions like those it was trained on, from one to {max_support} points in all.
- Its intervals are as right as its model: how often they hold on test functions is below.
  Predictions and intervals outside the range of the training data are meaningless.
- The given points determine what is learnt; `finite` is false where a number was none."""
CLOSED_FORM_REGRESSOR_MEASURED = """\
Mean squared error on new tasks, at points that were not shown, with 95 % intervals; smaller is
better. *zero* always answers 0."""
CLASSIFIER_MEASURED = """\
Accuracy in % on new tasks of held-out classes and on other data, with 95 % intervals. *frozen* is
how this bundle predicts: batch norm keeps the support set's statistics, and queries do not depend
on each other. *random* adapts a random initialisation in the same way."""
REGRESSOR_MEASURED = """\
Mean squared error on new tasks, at points that were not shown, with 95 % intervals; smaller is
better. *frozen* is how this bundle predicts; without batch norm all rows are the same. *random*
adapts a random initialisation in the same way; *zero* always answers 0."""


class _Texts(NamedTuple):
    """The texts of a card for one objective."""

    head: str
    use: str
    limits: str
    measured: str
    items: str  # unit of a class's examples
    graphs: str


GRADIENT_GRAPHS = """\
Without that package, run the graphs with any ONNX Runtime: `adapt` turns a support set into
weights, `predict_adapted` takes these weights and images, `few_shot` does both in one call, and
`predict` is the model before any adaptation."""
CLOSED_FORM_GRAPHS = """\
Without that package, run the graphs with any ONNX Runtime: `adapt` turns a support set into
features and a classifier, `predict_adapted` takes this classifier and images, `few_shot` does both
in one call. `embed` and `fit` are the two halves of `adapt`: to add a class, embed its images,
append the features to the kept ones, and fit."""
CLOSED_FORM_REGRESSOR_GRAPHS = """\
Without that package, run the graphs with any ONNX Runtime: `adapt` turns a support set into
features and a posterior, `predict_adapted` takes this posterior and inputs, `few_shot` does both
in one call. `embed` and `fit` are the two halves of `adapt`: to add points, embed them, append
the features to the kept ones, and fit."""
TEXTS = {
    CLASSIFICATION: _Texts(
        CLASSIFIER,
        CLASSIFIER_USE,
        CLASSIFIER_LIMITS,
        CLASSIFIER_MEASURED,
        "classes x {} images",
        GRADIENT_GRAPHS,
    ),
    REGRESSION: _Texts(
        REGRESSOR,
        REGRESSOR_USE,
        REGRESSOR_LIMITS,
        REGRESSOR_MEASURED,
        "function x {} points",
        GRADIENT_GRAPHS,
    ),
}
CLOSED_FORM_TEXTS = {
    CLASSIFICATION: _Texts(
        CLOSED_FORM,
        CLOSED_FORM_USE,
        CLOSED_FORM_LIMITS,
        CLOSED_FORM_MEASURED,
        "classes x {} images",
        CLOSED_FORM_GRAPHS,
    ),
    REGRESSION: _Texts(
        CLOSED_FORM_REGRESSOR,
        CLOSED_FORM_REGRESSOR_USE,
        CLOSED_FORM_REGRESSOR_LIMITS,
        CLOSED_FORM_REGRESSOR_MEASURED,
        "function x {} points",
        CLOSED_FORM_REGRESSOR_GRAPHS,
    ),
}


def model_card(manifest: Mapping[str, Any], info: CheckpointInfo, metrics: Metrics | None) -> str:
    """Return the card as Markdown."""
    task, inner, limits = manifest["task"], manifest.get("inner", {}), manifest["limits"]
    sizes = [str(size) for size in task["image_shape"]]
    form = {"inputs": f"inputs | {' x '.join(sizes)}, numbers as they are", "dtype": task["dtype"]}
    if "columns" in task:
        form["inputs"] = f"inputs | rows of a table, {len(task['columns'])} columns as they are"
    if "pixel_range" in task:
        form["inputs"] = f"images | {' x '.join(sizes)} (channels, height, width), pixels 0..255"
        form["dtype"] = "uint8"
    training = info.settings
    closed_form = training.closed_form
    texts = (CLOSED_FORM_TEXTS if closed_form else TEXTS)[info.objective]
    values = form | {"shape": ", ".join(sizes)} | task | inner | limits
    values["dtype"] = form["dtype"]
    head = texts.head.format(algorithm=ALGORITHMS[training.algorithm], **values)
    settings_rows = (
        ""
        if closed_form
        else f"""\
| inner optimiser | {inner["optimizer"]}, learning rate {inner["learning_rate"]:g} |
| by default | {inner["steps"]} steps on batches of {inner["batch"]} |
"""
    )
    provenance = manifest["provenance"]
    hashes = "\n".join(
        f"| {name.removesuffix('_sha256')} | `{value}` |"
        for name, value in provenance.items()
        if name.endswith("_sha256")
    )
    packages = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    return f"""# {manifest["name"]}

{head}
| network | {_architecture(info)} |
{settings_rows}| made by | {manifest["created_by"]} |

## Use

```python
{texts.use.format(**values)}
adapted.save("my-task.safetensors")
```

{texts.graphs}
{_columns(task)}`manifest.json` describes every tensor; the cases in `golden/` check that a
machine computes what was exported.

## Intended use and limits

{texts.limits.format(**values)}

## Data and training

{_training(info, texts)} The classes of the test split took no part.

## Evaluation

{texts.measured}

{_table(metrics)}
{_coverage(metrics)}
## Provenance

| SHA-256 of | |
|---|---|
{hashes}

{packages}. The hashes of all files are in `manifest.json`.
"""


def _columns(task: Mapping[str, Any]) -> str:
    """Return the columns of a table's rows and of its values."""
    if "columns" not in task:
        return ""

    def row(title: str, column: Mapping[str, Any]) -> str:
        names = ": " + ", ".join(column["categories"]) if "categories" in column else ""
        cells = (title, column["name"], column["kind"] + names)
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |\n"

    rows = [row("input", each) for each in task["columns"]]
    rows += [row("value", each) for each in task["targets"]]
    return f"""
Inputs are rows by the names of the columns, or float64 in their order: a date in seconds since
1970, a category as its place in the list. None or NaN is missing. Values are in the units of their
columns.

| | column | |
|---|---|---|
{"".join(rows)}
"""


def _coverage(metrics: Metrics | None) -> str:
    """Say how often the learner's intervals hold, where it gives any."""
    if metrics is None or not metrics.coverage:
        return ""
    shares = [
        f"{100 * methods[metrics.learner].mean:.1f} % ({dataset}, {shots}-shot)"
        for dataset, by_shots in metrics.coverage.items()
        for shots, methods in by_shots.items()
        if metrics.learner in methods
    ]
    if not shares:
        return ""
    text = f"\nOf the values, {', '.join(shares)} lie in their 95 % intervals."
    if found := metrics.interval_scales.get(metrics.learner):
        text += (
            f" Their width is {found.scale:g} times what training left, as {found.classes} "
            "validation classes say (with too few it is left as it was)."
        )
    return f"{text}\n"


def _architecture(info: CheckpointInfo) -> str:
    """Describe the network in words."""
    model, closed_form = info.settings.model, info.settings.closed_form
    if info.module or model.name not in ARCHITECTURES:
        name = f"`{info.module or model.name}`"
        return name if closed_form else f"{name}, adapted: {_adapted(info.settings.adapt)}"
    text = ARCHITECTURES[model.name].format(
        filters=model.filters,
        downsampling=DOWNSAMPLING[model.downsampling],
        hidden=", ".join(map(str, model.hidden)),
        activation=ACTIVATIONS[model.activation],
    )
    return text.removesuffix(", and a linear head") if closed_form else text


def _training(info: CheckpointInfo, texts: _Texts) -> str:
    """Describe the training in a sentence."""
    training = info.settings
    if training.closed_form:
        episode = training.episode
        items = texts.items.format(_any_of(episode.shots))
        return f"""\
Trained on the training split of **{info.dataset}**: {info.iteration} steps of
{training.meta_batch} episodes, {training.ways} {items} an episode, and {episode.queries} queries
{"a class" if training.algorithm != "bayes" else "each"}."""
    return f"""\
Meta-trained on the training split of **{info.dataset}**: {info.iteration} meta-iterations of
{training.meta_batch} tasks, {training.ways} {texts.items.format(training.train_shots)} a task,
{training.inner_steps} inner steps on batches of {training.inner_batch}."""


def _any_of(numbers: Sequence[int]) -> str:
    """Return numbers as words: `1 or 5`, and `1 to 20` where there are all of many."""
    low, high = min(numbers), max(numbers)
    if len(numbers) > 2 and sorted(numbers) == list(range(low, high + 1)):
        return f"{low} to {high}"
    return " or ".join(map(str, numbers))


def _adapted(adapt: Adapt) -> str:
    if isinstance(adapt, LastBlocks):
        return f"the last {adapt.last} blocks and the head"
    return adapt if isinstance(adapt, str) else ", ".join(adapt)


def _table(metrics: Metrics | None) -> str:
    """Return a row for each method and mode, and a column for each dataset and shots."""
    if metrics is None:
        return "No evaluation was given."
    head = ["method", "batch norm", *(f"{name} {shots}-shot" for name, shots in metrics.columns)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, mode, cells in metrics.table():
        words = [title(method), "" if mode == "none" else mode.replace("_", " "), *cells]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)
