"""Confusions between classes: labels of tasks mapped back to the dataset's classes.

A task's labels are a random map, so a confusion matrix over labels would be meaningless.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from reptile.data.dataset import PreparedClass, PreparedData
from reptile.evaluate.measure import Measurement
from reptile.minibatches import IntArray


class Confusions(NamedTuple):
    """The predictions of the trained learner for queries of K classes."""

    classes: tuple[PreparedClass, ...]  # those of the test split
    counts: IntArray  # [K, K] queries of class i taken for class j


class HardClass(NamedTuple):
    """A class, how often it was named correctly, and what it was most often taken for instead."""

    entry: PreparedClass
    right: int
    queries: int
    taken_for: PreparedClass
    times: int


def confusions(data: PreparedData, measurements: Sequence[Measurement]) -> Confusions:
    """Count confusions of the trained learner, each query independent of the others."""
    classes = tuple(entry for entry in data.classes if entry.split == "test")
    starts = np.array([entry.start for entry in classes])
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for measurement in measurements:
        predictions = measurement.outputs("frozen").argmax(-1)
        for task, predicted in zip(measurement.tasks, predictions, strict=True):
            actual = np.searchsorted(starts, task.query, side="right") - 1
            class_of = np.empty(task.query_targets.max() + 1, dtype=np.int64)
            class_of[task.query_targets] = actual
            np.add.at(counts, (actual, class_of[predicted]), 1)
    return Confusions(classes, counts)


def hardest(confusion: Confusions, limit: int) -> list[HardClass]:
    """Return the classes with the smallest share of right answers, the hardest first."""
    right, queries = confusion.counts.diagonal(), confusion.counts.sum(1)
    wrong = confusion.counts - np.diag(right)
    order = np.argsort(right / np.maximum(queries, 1), kind="stable")
    return [
        HardClass(
            confusion.classes[i],
            int(right[i]),
            int(queries[i]),
            confusion.classes[j],
            int(wrong[i, j]),
        )
        for i, j in zip(order, wrong[order].argmax(1), strict=True)
        if wrong[i, j]
    ][:limit]
