"""How much each tower counts: chosen on validation tasks, after training."""

from collections.abc import Iterator, Sequence
from math import comb

import numpy as np
import torch
from torch import Tensor

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.learn.engines.base import Engine
from reptile.learn.episodic import ClosedForm, EpisodicState
from reptile.learn.heads import Head
from reptile.models import Towers, size
from reptile.objectives import Objective
from reptile.settings import TrainSettings
from reptile.tasks import Purpose, Task, check_classes, held_out_task, random_stream

QUERIES = 5  # of each class
STEPS = 8  # shares are multiples of 1 / STEPS,
MOST = 60  # or of a larger fraction where those would be more than so many


@torch.no_grad()
def choose_shares(
    engine: Engine, state: EpisodicState, head: Head, tasks: Sequence[Task]
) -> tuple[float, ...]:
    """Return the shares of the towers with the best mean score on tasks, equal ones among the best.

    Args:
        engine: of the towers.
        state: trained, with statistics.
        head: what the towers were trained through.
        tasks: of the validation split; none for equal shares.
    """
    model = engine.model
    assert isinstance(model, Towers)
    equal = (1 / len(model.towers),) * len(model.towers)
    if not tasks or len(equal) == 1:
        return equal
    rows = np.unique(np.concatenate([np.concatenate([t.support, t.query]) for t in tasks]))
    features = engine.features(state.weights[: size(model)], rows, state.statistics)
    sizes = [tower.feature_size for tower in model.towers]
    learner = ClosedForm.of(model, head, state)

    def score(shares: tuple[float, ...]) -> float:
        parts = torch.split(features, sizes, dim=1)
        weighed = torch.cat(
            [part * (share / equal[0]) ** 0.5 for part, share in zip(parts, shares, strict=True)], 1
        )
        return float(np.mean([_score(learner, weighed, rows, task) for task in tasks]))

    candidates = sorted({equal, *candidate_shares(len(equal))}, key=lambda s: (np.ptp(s), s))
    return max(candidates, key=lambda shares: model.objective.better * score(shares))


def share_tasks(settings: TrainSettings, data: PreparedData, objective: Objective) -> list[Task]:
    """Draw tasks of the validation split, of each number of shots; none if it is too small."""
    classes = data.split("validation")
    ways = min(settings.ways, len(classes.starts))
    if ways < objective.least_ways:
        return []
    tasks = []
    for shots in settings.episode.shots:
        protocol = objective.validation._replace(ways=ways, shots=shots, queries=QUERIES)
        try:
            check_classes(classes, ways, shots + QUERIES, "validation split")
        except InputError:
            continue
        tasks += [
            held_out_task(
                random_stream(settings.seed, Purpose.CHOOSE, shots, number), classes, protocol
            )
            for number in range(settings.validation_tasks)
        ]
    return tasks


def _score(learner: ClosedForm, features: Tensor, rows: np.ndarray, task: Task) -> float:
    support = features[np.searchsorted(rows, task.support)]
    queries = features[np.searchsorted(rows, task.query)]
    targets = torch.from_numpy(task.support_targets).to(features.device)
    outputs = learner.outputs(support, targets, queries).double().cpu().numpy()
    return float(learner.model.objective.scores(outputs, task.query_targets))


def candidate_shares(towers: int) -> list[tuple[float, ...]]:
    """Return the shares of towers to try beside equal ones: multiples of a fraction, 1 in all."""
    steps = max(n for n in range(1, STEPS + 1) if n < 3 or comb(n + towers - 1, n) <= MOST)
    return [tuple(part / steps for part in parts) for parts in _parts(towers, steps)]


def _parts(towers: int, steps: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to part steps among towers."""
    if towers == 1:
        yield (steps,)
        return
    for first in range(steps + 1):
        for rest in _parts(towers - 1, steps - first):
            yield (first, *rest)
