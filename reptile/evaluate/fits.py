"""Functions of one number, as the trained learner predicts them: curves for the report.

Not for scores, which use the tasks' query points: see `measure`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reptile.data.dataset import PreparedData
from reptile.learn.engines.base import gather
from reptile.learn.episodic import ClosedForm
from reptile.models import Model, unflatten
from reptile.tasks import Task

GRID = 121  # places at which a curve is drawn

Array = npt.NDArray[np.float64]


class Points(NamedTuple):
    """Points of the true function."""

    x: Array  # [N]
    y: Array  # [N]


class Fit(NamedTuple):
    """One task: its points, and the network's function after some numbers of inner steps."""

    shown: Points
    queries: Points
    x: Array  # [GRID]
    by_step: Mapping[int, Array]  # [GRID] after so many steps; in closed form 0 and 1
    deviation: Array | None = None  # standard deviation of the last, [GRID], where there is one


@torch.no_grad()
def fit_curves(
    model: Model, data: PreparedData, tasks: Sequence[Task], along: Mapping[int, Tensor]
) -> tuple[Fit, ...]:
    """Evaluate the network over the range of the data's inputs.

    Args:
        model: of one number; its first output is drawn.
        data: where the tasks' rows point.
        tasks: T tasks.
        along: weights [T, P] by the number of steps that led to them.
    """
    x = _grid(data)
    fits = []
    for number, task in enumerate(tasks):
        curves = {}
        for steps, weights in along.items():
            adapted = weights[number]
            grid = torch.from_numpy(x).to(adapted).view(-1, *data.image_shape)
            values = model.forward(unflatten(model, adapted), grid)[:, 0]
            curves[steps] = values.double().cpu().numpy()
        shown = _points(data, task.support, task.support_targets)
        fits.append(Fit(shown, _points(data, task.query, task.query_targets), x, curves))
    return tuple(fits)


@torch.no_grad()
def fit_posteriors(
    learner: ClosedForm, data: PreparedData, tasks: Sequence[Task]
) -> tuple[Fit, ...]:
    """Return a Bayesian learner's predictions before and after it has seen the support set."""
    x, device = _grid(data), learner.params["head.mean"].device
    grid = learner.features(torch.from_numpy(x).float().to(device).view(-1, *data.image_shape))
    fits = []
    for task in tasks:
        shown = _points(data, task.support, task.support_targets)
        support = learner.features(gather(data.images, task.support, device))
        values = torch.from_numpy(task.support_targets).to(device)
        posteriors = (
            learner.posterior(support[:0], values[:0]),
            learner.posterior(support, values),
        )
        (before, _), (after, variance) = (each.predict(grid) for each in posteriors)
        curves = {0: before[:, 0].cpu().numpy(), 1: after[:, 0].cpu().numpy()}
        queries = _points(data, task.query, task.query_targets)
        fits.append(Fit(shown, queries, x, curves, variance[:, 0].sqrt().cpu().numpy()))
    return tuple(fits)


def _grid(data: PreparedData) -> Array:
    return np.linspace(float(data.images.min()), float(data.images.max()), GRID)


def _points(
    data: PreparedData, rows: npt.NDArray[np.int64], values: npt.NDArray[np.float32]
) -> Points:
    x = data.images[rows].reshape(len(rows)).astype(np.float64)
    return Points(x, values[:, 0].astype(np.float64))
