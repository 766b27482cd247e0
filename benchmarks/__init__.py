"""How fast the library is, each figure measured beside its baseline: `python -m benchmarks`."""

import reptile  # sets the defaults of OpenMP before any module here imports torch

__all__ = ["reptile"]
