"""Few-shot learning with Reptile: meta-train, evaluate, export to ONNX, adapt anywhere.

The rooms, in the order data flows: `data`, `tasks`, `models`, `learn`, `evaluate`, `export`,
`runtime`. Importing `reptile` alone imports none of them, so that a consumer of a bundle needs
numpy and onnxruntime only (`from reptile.runtime import FewShotModel`).
"""

from reptile.cpus import settle_threads

settle_threads()  # before any module here imports torch

__version__ = "0.1.0"
