"""How fast the library is, each figure measured beside its baseline: `python -m benchmarks`."""

from reptile.cpus import settle_threads

settle_threads()  # before any module here loads torch
