"""Adapt a bundle with numpy and onnxruntime alone, and compare with the bundle's golden tensors.

    pip install numpy onnxruntime
    python with_onnxruntime.py path/to/bundle

Every way of calling the graphs is here: copy what you need. `reptile.runtime` (see the example
beside this one) also checks the files' hashes, the images and the labels, as ONNX Runtime does not.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Array = npt.NDArray[Any]


def mini_batches(rng: np.random.Generator, support: int, inner: dict[str, Any]) -> Array:
    """Say which support images each gradient step sees, as the bundle was trained: [steps, batch].

    Shuffle, cut into rows, shuffle again at the end; a row may cross it. `inner` is the manifest's.
    """
    steps, batch = inner["steps"], min(inner["batch"], support)
    if inner["replacement"]:
        rows = [rng.permutation(support)[:batch] for _ in range(steps)]
        return np.array(rows, dtype=np.int64).reshape(steps, batch)
    shuffles = [rng.permutation(support) for _ in range(-(-steps * batch // support))]
    order = np.array(shuffles, dtype=np.int64).reshape(-1)
    return order[: steps * batch].reshape(steps, batch)


class FewShotModel:
    """A bundle's sessions, and the numbers it was made for."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        self.sessions = {
            name: ort.InferenceSession(
                str(bundle / graph["path"]), providers=["CPUExecutionProvider"]
            )
            for name, graph in self.manifest["graphs"].items()
        }

    def adapt(self, images: Array, labels: Array, **steps: Array) -> dict[str, Array]:
        """Adapt to a task: float32 images [N, C, H, W] in 0..255, int64 labels [N] → weights.

        `steps` are what a bundle that learns by gradient steps needs besides: `gradient_steps`.
        """
        feeds = {"support_images": images, "support_labels": labels, **steps}
        names = ["finite", *self.manifest["adapted"]]
        finite, *weights = self.sessions["adapt"].run(names, feeds)
        if not finite:
            raise ValueError("the adaptation gave no finite numbers: fewer steps, a lower rate?")
        return dict(zip(names[1:], weights, strict=True))

    def gradient_steps(self, rng: np.random.Generator, support: int) -> dict[str, Array]:
        """Return the inputs of gradient steps; none if the bundle fits in closed form."""
        inner = self.manifest.get("inner")
        if inner is None:
            return {}
        return {
            "batches": mini_batches(rng, support, inner),
            "learning_rate": np.array(inner["learning_rate"], dtype=np.float32),
        }

    def predict(self, weights: dict[str, Array], images: Array) -> Array:
        """Return logits [N, ways]; drop the outputs of unused classes before a softmax.

        Of a closed-form bundle `ways` is the largest label + 1.
        """
        logits: Array = self.sessions["predict_adapted"].run(
            ["logits"], {"images": images, **weights}
        )[0]
        return logits

    def few_shot(self, feeds: dict[str, Array]) -> Array:
        """Adapt and predict in one call, as a stateless server does."""
        logits: Array = self.sessions["few_shot"].run(["logits"], feeds)[0]
        return logits


def _steps(feeds: dict[str, Array]) -> dict[str, Array]:
    """Return the inputs of gradient steps, if there are any."""
    return {name: feeds[name] for name in ("batches", "learning_rate") if name in feeds}


def main(bundle: Path) -> int:
    """Run every golden task both ways, compare with the expected logits, print a table."""
    model = FewShotModel(bundle)
    golden = bundle / "golden"
    cases = json.loads((golden / "golden.json").read_text(encoding="utf-8"))["cases"]
    failed = 0
    print(f"{'task':10} {'steps':>5} {'support':>7}  {'graphs':23}  {'deviation':>9}")
    for case in cases:
        feeds = {name: np.load(golden / file) for name, file in case["inputs"].items()}
        if case["graph"] == "adapt" and not np.load(golden / case["outputs"]["finite"]):
            try:
                images, labels = feeds["support_images"], feeds["support_labels"]
                model.adapt(images, labels, **_steps(feeds))
                failed += 1
                print(f"{'refused':10} ADAPTED, AND SHOULD NOT HAVE")
            except ValueError:
                print(f"{'refused':10} ok")
        if case["graph"] != "few_shot":
            continue
        expected = np.load(golden / case["outputs"]["logits"])
        queries = feeds["query_images"]
        images, labels, steps = feeds["support_images"], feeds["support_labels"], _steps(feeds)
        count = len(steps.get("batches", ()))
        weights = model.adapt(images, labels, **steps)
        for graphs, logits in (
            ("adapt, predict_adapted", model.predict(weights, queries)),
            ("few_shot", model.few_shot(feeds)),
        ):
            deviation = np.abs(logits - expected)
            right = bool((deviation <= case["atol"] + case["rtol"] * np.abs(expected)).all())
            failed += not right
            print(
                f"{Path(case['outputs']['logits']).parent.name:10} {count:5} "
                f"{len(images):7}  {graphs:23}  {deviation.max():9.1e}  "
                + ("ok" if right else "BEYOND THE TOLERANCE")
            )
    # And with mini-batches drawn here, if there are any, as for a new task.
    weights = model.adapt(
        images, labels, **model.gradient_steps(np.random.default_rng(0), len(images))
    )
    predicted = model.predict(weights, images)[:, : labels.max() + 1].argmax(axis=1)
    right = (predicted == labels).sum()
    print(f"adapted again: {right} of {len(labels)} support images classified correctly")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} BUNDLE")
    sys.exit(main(Path(sys.argv[1])))
