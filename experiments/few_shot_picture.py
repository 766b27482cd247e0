"""Draw the README's picture from the artifacts: `python experiments/few_shot_picture.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from reptile.data.dataset import load_prepared
from reptile.runtime import FewShotModel
from reptile.settings import EvaluateSettings
from reptile.tasks import FewShotProtocol, Purpose, held_out_task, random_stream

ARTIFACTS = Path("artifacts")
NAMES = "ABCDE"
QUERIES = 4

data = load_prepared(ARTIFACTS / "prepared")
model = FewShotModel.load(ARTIFACTS / "bundle")
protocol = FewShotProtocol.of(EvaluateSettings(queries=QUERIES), model.ways, 1)
# The first task of the stream, not one that was picked.
task = held_out_task(random_stream(0, Purpose.EVALUATE, 0), data.split("test"), protocol)
support = data.images[task.support]
adapted = model.adapt(support, [NAMES[label] for label in task.support_targets])
queries = data.images[task.query]
prediction = adapted.predict(queries)

figure, axes = plt.subplot_mosaic(
    [
        [f"s{w}", "gap", *(f"q{w}{q}" for q in range(QUERIES)), "gap2", "loss", "loss", "loss"]
        for w in range(5)
    ],
    figsize=(11, 5),
    width_ratios=[1, 0.35, 1, 1, 1, 1, 0.6, 1, 1, 1],
    layout="constrained",
)
for name, axis in axes.items():
    if name != "loss":
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
for way in range(5):
    axes[f"s{way}"].imshow(support[way, 0], cmap="gray", vmin=0, vmax=255)
    axes[f"s{way}"].set_ylabel(NAMES[way], rotation=0, labelpad=14, va="center", fontsize=14)
    for query in range(QUERIES):
        row = way * QUERIES + query
        axis = axes[f"q{way}{query}"]
        axis.imshow(queries[row, 0], cmap="gray", vmin=0, vmax=255)
        right = prediction.labels[row] == NAMES[way]
        axis.text(
            26,
            3,
            prediction.labels[row],
            fontsize=12,
            weight="bold",
            ha="right",
            va="center",
            color="#1a7f37" if right else "#cf222e",
        )
headings = {"s0": "one example each", "q00": "new images, and what they are taken for"}
for name, heading in headings.items():
    # Left out of the layout, or they would widen their columns.
    axes[name].text(0, -3, heading, fontsize=11).set_in_layout(False)
axes["loss"].plot(np.arange(1, len(adapted.losses) + 1), adapted.losses, color="#0969da")
axes["loss"].set(xlabel="gradient step", ylabel="loss", title="learning, inside ONNX Runtime")
axes["loss"].spines[["top", "right"]].set_visible(False)
axes["loss"].set_yscale("log")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
