"""The Kubeflow pipeline: its graph, and running it, here or on a cluster. Holds no stage's work."""

from pathlib import Path

COMPILED = Path(__file__).parent / "reptile.yaml"
SWEEP = Path(__file__).parent / "sweep.yaml"
