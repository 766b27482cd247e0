"""Benchmarks of the library, each compared with a baseline: `python -m benchmarks`."""

from reptile.cpus import settle_threads

settle_threads()  # before any module here loads torch
