"""The bundle's MODEL_CARD.md, for the person who finds the bundle without its project.

Says only what the manifest and the checkpoint know.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from reptile.learn.checkpoint import CheckpointInfo

ARCHITECTURES = {
    "conv4": "four 3x3 convolutions of {filters} filters, {downsampling}, "
    "with batch norm and ReLU, and a linear head",
    "mlp": "hidden layers of {hidden} units with {activation}, and a linear head",
}
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh"}
DOWNSAMPLING = {"stride": "of stride 2", "pool": "each with 2x2 max-pooling"}
ALGORITHMS = {"reptile": "Reptile", "fomaml": "first-order MAML"}


def model_card(manifest: Mapping[str, Any], info: CheckpointInfo) -> str:
    """Return the card as Markdown."""
    task, inner, limits = manifest["task"], manifest["inner"], manifest["limits"]
    channels, height, width = task["image_shape"]
    training = info.settings
    architecture = ARCHITECTURES[training.model.name].format(
        filters=training.model.filters,
        downsampling=DOWNSAMPLING[training.model.downsampling],
        hidden=", ".join(map(str, training.model.hidden)),
        activation=ACTIVATIONS[training.model.activation],
    )
    provenance = manifest["provenance"]
    hashes = "\n".join(
        f"| {name.removesuffix('_sha256')} | `{value}` |"
        for name, value in provenance.items()
        if name.endswith("_sha256")
    )
    packages = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    return f"""# {manifest["name"]}

A few-shot image classifier that learns inside ONNX Runtime. Give it a few labelled images of up
to {task["ways"]} classes it has never seen; it adapts to them in {inner["steps"]} small optimiser
steps and then tells further images of these classes apart. Its initialisation was meta-trained
with {ALGORITHMS[training.algorithm]} (Nichol, Achiam, Schulman: arXiv 1803.02999).

| | |
|---|---|
| images | {channels} x {height} x {width} (channels, height, width), pixels 0..255 |
| classes at once | up to {task["ways"]} |
| network | {architecture} |
| inner optimiser | {inner["optimizer"]}, learning rate {inner["learning_rate"]:g} |
| by default | {inner["steps"]} steps on batches of {inner["batch"]} |
| made by | {manifest["created_by"]} |

## Use

```python
from reptile.runtime import FewShotModel  # needs numpy and onnxruntime only

model = FewShotModel.load("path/to/this/folder")
adapted = model.adapt(images, labels)  # uint8 [N, {channels}, {height}, {width}], one name each
names, probabilities = adapted.predict(more_images)
adapted.save("my-task.safetensors")
```

Without that package, run the graphs with any ONNX Runtime: `adapt` turns a support set into
weights, `predict_adapted` takes these weights and images, `few_shot` does both in one call, and
`predict` is the model before any adaptation. `manifest.json` describes every tensor; the cases in
`golden/` tell whether a machine computes what was exported.

## Intended use and limits

- For telling apart a few classes of images like those it was trained on, from one to
  {limits["max_support"]} labelled examples in all; at most {limits["max_steps"]} steps.
- It always answers with one of the classes it was shown: an image of none of them gets one too.
- The probabilities are not calibrated.
- Images unlike the training data (see below) may be told apart badly; measure before relying on it.
- Not for decisions about people.
- The labels and images given decide what is learnt; `finite` is false where the numbers diverged.

## Data and training

Meta-trained on the training split of **{info.dataset}**: {info.iteration} meta-iterations of
{training.meta_batch} tasks, {training.ways} classes x {training.train_shots} images a task,
{training.inner_steps} inner steps on batches of {training.inner_batch}. The classes of the test
split took no part.

## Evaluation

Accuracy in % on new tasks of held-out classes and on other data, with 95 % intervals. *frozen* is
how this bundle predicts: batch norm keeps the support set's statistics, and queries do not depend
on each other. *random* adapts a random initialisation in the same way.

{_table(manifest["metrics"])}

## Provenance

| SHA-256 of | |
|---|---|
{hashes}

{packages}. The hashes of all files are in `manifest.json`.
"""


def _table(metrics: Mapping[str, Any]) -> str:
    rows = list(_rows(metrics))
    if not rows:
        return "No evaluation was given."
    head = "| data | shots | batch norm | accuracy | random |\n|---|---|---|---|---|"
    return "\n".join([head, *rows])


def _rows(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Read dataset, then shots, then method; see the evaluation's metrics.json."""
    for dataset, by_shots in metrics.items():
        for shots, methods in by_shots.items():
            for method, scores in methods.items():
                accuracy, chance = _percent(scores, ""), _percent(scores, "random_")
                label = method.replace("_", " ")
                yield f"| {dataset} | {shots} | {label} | {accuracy} | {chance} |"


def _percent(scores: Mapping[str, float], prefix: str) -> str:
    if f"{prefix}accuracy" not in scores:
        return "-"
    return f"{100 * scores[f'{prefix}accuracy']:.1f} ± {100 * scores[f'{prefix}interval']:.1f}"
