"""Draw learning curves of `reptile reproduce`: `learning_curve.py result.json picture.png`."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

result, picture = map(Path, sys.argv[1:])
seeds = json.loads(result.read_text(encoding="utf-8"))["seeds"]
figure, axes = plt.subplots(figsize=(5.6, 3), layout="constrained")
for seed in seeds:
    points = seed["curve"]
    axes.plot(
        [point["iteration"] for point in points],
        [100 * point["accuracy" if "accuracy" in point else "score"] for point in points],
        marker=".",
        color="#2a6f97",
    )
axes.set_xlabel("meta-iterations")
axes.set_ylabel("1-shot accuracy, %")
axes.set_title("5-way tasks of the training characters, transductive", fontsize=9)
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(picture, dpi=110)
