"""Studies on accuracy, and the scripts that draw the pictures in docs."""

from reptile.cpus import settle_threads

settle_threads()  # before any module here loads torch
