"""The golden cases of a closed-form learner's bundle."""

from pathlib import Path

import numpy as np
import torch

from reptile.data.dataset import PreparedData
from reptile.export import closed_form_reference as reference
from reptile.export.golden import Golden
from reptile.export.reference import Array, Tensors
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.episodic import ClosedForm
from reptile.objectives import CLASSIFICATION
from reptile.tasks import FewShotProtocol, Purpose, check_classes, held_out_task, random_stream

MANY, SHOTS = 20, 5  # of the largest task, where the test split has as many
QUERIES = 2
FINITE = {"finite": np.array(True)}


def write_closed_form_golden(folder: Path, checkpoint: Checkpoint, data: PreparedData) -> None:
    """Write inputs and outputs of every graph for small tasks of the test split.

    `some` has up to 5 classes of one image, `gaps` up to 3, without label 0 and with gaps between
    the others, `one` a single image. `many` has features alone, of up to 20 classes with 5 images;
    `refused` has the same with a NaN, for which `fit` must say `finite` = false. Of a regressor,
    `some` has 5 points, `many` up to 20, and there is no `gaps`.
    Of a table's rows, `missing` has two without any value.
    """
    classes = data.split("test")
    objective = checkpoint.info.objective
    named = objective is CLASSIFICATION
    check_classes(classes, objective.least_ways, 1 + QUERIES, f"test split of {data.name}")
    rng, golden = random_stream(0, Purpose.EXPORT), Golden(folder, data.index.coding)
    learners = [
        reference.cast(checkpoint.closed_form, each) for each in (torch.float32, torch.float64)
    ]

    def draw(ways: int, shots: int, queries: int = QUERIES) -> tuple[Array, Array, Array]:
        each = shots + queries
        available = int((classes.counts >= each).sum())
        protocol = FewShotProtocol(min(ways, available), shots, queries, steps=0, batch=1)
        task = held_out_task(rng, classes, protocol)
        queried = np.asarray(data.images[task.query[:QUERIES]])
        return np.asarray(data.images[task.support]), task.support_targets, queried

    most = int(classes.counts.max()) - QUERIES  # points that a function has to show
    images, labels, queries = draw(5, 1) if named else draw(1, min(5, most))
    _add_task(golden, "some", learners, images, labels, queries)
    first = np.zeros(1, dtype=np.int64) if named else labels[:1]
    _add_task(golden, "one", learners, images[:1], first, queries)
    if named:
        images, labels, queries = draw(3, 1)
        _add_task(golden, "gaps", learners, images, 2 * labels + 1, queries)
    embedded = [{"features": reference.embed(learner, queries).numpy()} for learner in learners]
    golden.add("embed", "embed", {"images": queries.astype(np.float32)}, *embedded)
    if data.index.coding:
        blank = data.index.coding.blank()
        embedded = [{"features": reference.embed(each, blank).numpy()} for each in learners]
        golden.add("embed", "missing", {"images": blank}, *embedded)
    shots = SHOTS if (classes.counts >= SHOTS).sum() >= 2 else 1
    images, labels, _ = draw(MANY, shots, 0) if named else draw(1, min(MANY, most), 0)
    adapted = [reference.adapt(learner, images, labels) for learner in learners]
    _add_fit(golden, "many", adapted, labels)
    spoilt = adapted[1]["features"].copy()
    spoilt[0, 0] = np.nan
    golden.refuse("fit", "refused", {"features": spoilt, "support_labels": labels})
    golden.close()


def _add_fit(golden: Golden, name: str, adapted: list[Tensors], labels: Array) -> Tensors:
    """Add a case of `fit`; return the classifier, or the posterior, in float64."""
    heads = [{key: value for key, value in each.items() if key != "features"} for each in adapted]
    feeds = {"features": adapted[1]["features"], "support_labels": labels}
    golden.add("fit", name, feeds, heads[0], heads[1] | FINITE)
    return heads[1]


def _add_task(
    golden: Golden,
    name: str,
    learners: list[ClosedForm],
    images: Array,
    labels: Array,
    queries: Array,
) -> None:
    """Add a case of each graph that needs a support set."""
    task = {"support_images": images.astype(np.float32), "support_labels": labels}
    query_images = queries.astype(np.float32)
    adapted = [reference.adapt(learner, images, labels) for learner in learners]
    answers = [
        reference.predict(learner, tensors, queries)
        for learner, tensors in zip(learners, adapted, strict=True)
    ]
    golden.add("adapt", name, task, adapted[0], adapted[1] | FINITE)
    head = _add_fit(golden, name, adapted, labels)
    golden.add("predict_adapted", name, {"images": query_images} | head, *answers)
    feeds = task | {"query_images": query_images}
    golden.add("few_shot", name, feeds, answers[0], answers[1] | FINITE)
