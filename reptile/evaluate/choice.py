"""Decisions on validation classes: which learner, and how wide its intervals are.

Validation tasks share their classes (the subjects of a table), so what is compared is the mean of
each class, never of each task. Arrays in, decisions out; what is measured is in `comparison`.
"""

import math
from collections.abc import Mapping

import numpy as np
from scipy.special import ndtr, stdtrit

from reptile.evaluate.adapting import FloatArray
from reptile.evaluate.metrics import IntervalScale

LEAST_CLASSES = 10  # whose scale has a standard error of at most sqrt(2 / 10) / 2, some 22 %


def by_preference(scores: Mapping[str, FloatArray], better: int) -> tuple[str, ...]:
    """Order learners by the one-standard-error rule.

    The first is the simplest whose mean is not worse than the best mean by more than one standard
    error of their difference, paired by class; the second is the first of the others; and so on.
    Breiman et al., Classification and regression trees (1984); Hastie et al., The elements of
    statistical learning, 7.10. With few classes, one standard error is widened by Student's t to
    the confidence that it has with many (84 %).

    Args:
        scores: of each learner, the simplest first: its mean score on each of C classes, [C].
        better: 1 where a larger score is better, -1 where a smaller one is.
    """
    left, order = dict(scores), []
    while left:
        order.append(_simplest_of_the_best(left, better))
        del left[order[-1]]
    return tuple(order)


def _simplest_of_the_best(scores: Mapping[str, FloatArray], better: int) -> str:
    best = max(scores, key=lambda name: better * scores[name].mean())
    classes = len(scores[best])
    if classes < 2:
        return next(iter(scores))
    wide = float(stdtrit(classes - 1, ndtr(1))) / math.sqrt(classes)

    def behind(name: str) -> bool:
        short = better * (scores[best] - scores[name])
        return bool(short.mean() > wide * short.std(ddof=1))

    return next(name for name in scores if not behind(name))


def interval_scale(errors: FloatArray) -> IntervalScale:
    """Return what standard deviations are to be multiplied by, from squared standardised errors.

    The scale of greatest likelihood: Levi et al., Evaluating and calibrating uncertainty prediction
    in regression tasks (2019); of Gaussian processes, Dubrule, Cross validation of kriging (1983).
    Predictions stay as they are. It is 1 from fewer than LEAST_CLASSES classes, or where the errors
    are all 0 or not finite.

    Args:
        errors: (value - prediction)² / variance, its mean on each of C classes, [C].
    """
    mean = float(errors.mean())
    known = len(errors) >= LEAST_CLASSES and math.isfinite(mean) and mean > 0
    scale = math.sqrt(mean) if known else 1.0
    return IntervalScale(scale=float(f"{scale:.4g}"), classes=len(errors))


def mean_of_classes(values: FloatArray, classes: np.ndarray) -> FloatArray:
    """Return the mean of the values [N] of each class that occurs, [C].

    Args:
        values: one a query.
        classes: of each query, [N].
    """
    _, places, counts = np.unique(classes, return_inverse=True, return_counts=True)
    return np.bincount(places, values) / counts
