"""The pipeline's stages and what holds them together, as components of Kubeflow Pipelines.

Each is a typed signature and one call into `components.artifacts`, as only its own source travels:
it runs in the project's image, which has everything else. How they are joined is in `pipeline`.
"""

from components.control import gate, summarise, tabulate
from components.stages import evaluate, export, measure, prepare, publish, train, verify

__all__ = [
    "evaluate",
    "export",
    "gate",
    "measure",
    "prepare",
    "publish",
    "summarise",
    "tabulate",
    "train",
    "verify",
]
