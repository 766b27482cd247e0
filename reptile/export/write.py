"""The bundle: graphs, manifest, golden tensors and model card in one folder, written whole.

For building graphs see `graphs`; whether a checkpoint may be exported is decided in `stages`.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from reptile import __version__
from reptile.bundle_format import (
    CARD_FILE,
    GOLDEN_FOLDER,
    MANIFEST_FILE,
    bundle_folders,
    closed_form_learner,
    gradient_learner,
    graph_path,
    manifest_json,
)
from reptile.data.coding import Coding
from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.evaluate.metrics import Metrics
from reptile.export import reference
from reptile.export.card import model_card
from reptile.export.closed_form import build_closed_form_graphs, check_support
from reptile.export.closed_form_golden import write_closed_form_golden
from reptile.export.coding import columns_of, with_coding
from reptile.export.golden import Golden
from reptile.export.graphs import build_graphs, describe
from reptile.export.reference import Array, SupportSet
from reptile.files import atomic_directory, sha256_file, write_json
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.unadapted import with_measured_intervals
from reptile.objectives import CLASSIFICATION
from reptile.provenance import settings_sha256, versions
from reptile.settings import EvaluateSettings, ExportSettings
from reptile.tasks import (
    Purpose,
    check_classes,
    held_out_task,
    random_stream,
)

GOLDEN_STEPS = (0, 5, 50)
_PRECISIONS = (torch.float32, torch.float64)


def export_bundle(
    settings: ExportSettings,
    checkpoint: Checkpoint,
    data: PreparedData,
    metrics: Metrics | None,
    folder: Path,
    *,
    protocol: EvaluateSettings,
) -> None:
    """Write the bundle of a checkpoint; the same inputs give the same bytes.

    Args:
        settings: the bundle's name and limits.
        checkpoint: the meta-trained initialisation.
        data: what it was trained on; its test split gives the golden tensors their images.
        metrics: of the evaluation, embedded as they are, whose `learner` the checkpoint is: its
            intervals get the scale that was measured; None if there was none.
        folder: replaced as a whole.
        protocol: the evaluation's settings, whose steps and batch become the bundle's defaults.

    Raises:
        InputError: max_steps below the protocol's steps, max_support beyond what ridge can solve,
            or a test split without enough classes.
    """
    closed_form = checkpoint.info.settings.closed_form
    if not closed_form and settings.max_steps < protocol.steps:
        raise InputError(
            f"export.max_steps = {settings.max_steps} is below evaluate.steps = {protocol.steps}, "
            "the number of steps that the bundle takes by default; raise one or lower the other"
        )
    values = None if metrics is None else metrics.model_dump(mode="json")
    checkpoint = with_measured_intervals(checkpoint, values)
    graphs, coding = _graphs(settings, checkpoint), data.index.coding
    if coding:
        graphs = {name: with_coding(graph, coding) for name, graph in graphs.items()}
    with atomic_directory(folder) as temporary:
        for name, graph in graphs.items():
            path = temporary / graph_path(name)
            path.parent.mkdir(parents=True)
            path.write_bytes(graph.SerializeToString(deterministic=True))
        if closed_form:
            write_closed_form_golden(temporary / GOLDEN_FOLDER, checkpoint, data)
        else:
            _write_golden(temporary / GOLDEN_FOLDER, checkpoint, data, settings, protocol)
        manifest = _manifest(settings, checkpoint, metrics, protocol, graphs, coding)
        card = model_card(manifest, checkpoint.info, metrics)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest["files"] = {
            path.relative_to(temporary).as_posix(): sha256_file(path) for path in files
        }
        write_json(temporary / MANIFEST_FILE, manifest)


def export_bundles(
    settings: ExportSettings,
    learners: Mapping[str, Checkpoint],
    data: PreparedData,
    metrics: Metrics,
    folder: Path,
    best: Path,
    *,
    protocol: EvaluateSettings,
) -> None:
    """Write the bundle of each learner, and once more the one that validation tasks choose.

    Args:
        settings: name and limits of them all.
        learners: checkpoints by their method in `metrics`; the first is chosen where the evaluation
            had no validation tasks.
        data: what they were trained on.
        metrics: of the evaluation that measured them on the same tasks.
        folder: replaced as a whole; each bundle lies in a folder of the name of its algorithm,
            which ends the bundle's own name too.
        best: where the best one goes; replaced as a whole.
        protocol: the evaluation's settings.

    Raises:
        InputError: as `export_bundle`.
    """
    chosen = metrics.best_of(list(learners))
    names = bundle_folders({name: each.info.settings.algorithm for name, each in learners.items()})
    with atomic_directory(folder) as temporary:
        for method, checkpoint in learners.items():
            seen = metrics.model_copy(update={"learner": method})
            if method != metrics.learner:
                seen = seen.model_copy(update={"differences": {}})  # which are to another learner
            named = settings.model_copy(update={"name": f"{settings.name}-{names[method]}"})
            export_bundle(
                named, checkpoint, data, seen, temporary / names[method], protocol=protocol
            )
    with atomic_directory(best) as temporary:
        shutil.copytree(folder / names[chosen], temporary, dirs_exist_ok=True)


def _graphs(settings: ExportSettings, checkpoint: Checkpoint) -> dict[str, onnx.ModelProto]:
    if not checkpoint.info.settings.closed_form:
        return build_graphs(checkpoint, settings.max_steps)
    algorithm = checkpoint.info.settings.algorithm
    check_support(algorithm, settings.max_support)
    # As many classes as examples: each needs one.
    return build_closed_form_graphs(checkpoint, settings.max_support)


def _manifest(
    settings: ExportSettings,
    checkpoint: Checkpoint,
    metrics: Metrics | None,
    protocol: EvaluateSettings,
    graphs: Mapping[str, onnx.ModelProto],
    coding: Coding | None,
) -> dict[str, Any]:
    model, _, info = checkpoint
    optimizer, closed_form = info.settings.optimizer, info.settings.closed_form
    if closed_form:
        learner = closed_form_learner(info.settings.head)
    else:
        learner = gradient_learner(
            optimizer=optimizer.name.removeprefix("scaled_"),  # the factors are in the graphs
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            steps=protocol.steps,
            batch=protocol.batch,
            max_steps=settings.max_steps,
        )
    return manifest_json(
        name=settings.name,
        created_by=f"reptile {__version__}",
        kind=info.objective.name,
        learner=learner,
        outputs=_outputs(settings, checkpoint),
        image_shape=model.image_shape,
        model=_network(checkpoint),
        pixels=info.pixels,
        columns=columns_of(coding) if coding else None,
        max_support=settings.max_support,
        graphs={
            name: {
                "inputs": describe(graph.graph.input),
                "outputs": describe(graph.graph.output),
            }
            for name, graph in graphs.items()
        },
        metrics=None if metrics is None else metrics.model_dump(mode="json"),
        provenance={
            "dataset": info.dataset,
            "data_sha256": info.data_sha256,
            "splits_sha256": info.splits_sha256,
            "settings_sha256": settings_sha256(info.settings.model_dump(mode="json")),
            "code_sha256": info.code_sha256,
            "versions": info.versions | versions("torch", "onnx", "onnxscript"),
        },
    )


def _outputs(settings: ExportSettings, checkpoint: Checkpoint) -> int:
    """Return the outputs of the head; of a closed-form classifier, the most classes of a task."""
    if not checkpoint.info.settings.closed_form:
        return checkpoint.model.outputs
    if checkpoint.info.objective is CLASSIFICATION:
        return settings.max_support
    return len(checkpoint.closed_form.params["head.noise"])


def _network(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the network's settings, or the name of the user's module."""
    if checkpoint.info.module:
        return {"name": "module", "module": checkpoint.info.module}
    return checkpoint.info.settings.model.model_dump(mode="json")


def _write_golden(
    folder: Path,
    checkpoint: Checkpoint,
    data: PreparedData,
    settings: ExportSettings,
    protocol: EvaluateSettings,
) -> None:
    """Write inputs and outputs of every graph for two small tasks of the test split, and a refusal.

    `adapt` has as many classes as the head, and is run for 0, 5 and 50 steps. `crossing` has no
    images of label 0, and mini-batches that go on from one shuffle of the support set in the next.

    A trajectory so unstable that a comparison says nothing (a cold Adam takes the sign of gradients
    that are only noise) is left out.

    `refused` is a step with an infinite learning rate, for which `adapt` must say `finite` = false.
    """
    info, classes = checkpoint.info, data.split("test")
    steps = [steps for steps in GOLDEN_STEPS if steps <= settings.max_steps]
    small = info.objective.validation._replace(
        ways=info.settings.ways, steps=steps[-1], batch=protocol.batch
    )
    each = small.shots + small.queries
    check_classes(classes, small.ways, each, f"test split of {data.name}")
    rng = random_stream(0, Purpose.EXPORT)
    task = held_out_task(rng, classes, small)
    absent = 1 if small.ways > 2 else 0  # a classifier's task has two classes; a regressor's is one
    few = small._replace(ways=small.ways - absent, shots=each, queries=0, steps=min(5, steps[-1]))
    crossing = held_out_task(rng, classes, few._replace(batch=few.ways * each - 1))
    crossing = crossing._replace(support_targets=crossing.support_targets + absent)

    golden = Golden(folder, data.index.coding)
    images = np.asarray(data.images[task.query])
    logits = [{"logits": reference.predict(checkpoint, images, dtype)} for dtype in _PRECISIONS]
    golden.add("predict", "predict", {"images": images.astype(np.float32)}, *logits)
    if data.index.coding:
        blank = data.index.coding.blank()
        logits = [{"logits": reference.predict(checkpoint, blank, each)} for each in _PRECISIONS]
        golden.add("predict", "missing", {"images": blank}, *logits)
    for name, each_task, numbers in (("crossing", crossing, [few.steps]), ("adapt", task, steps)):
        support = SupportSet(
            np.asarray(data.images[each_task.support]),
            each_task.support_targets,
            np.array(each_task.batches, dtype=np.int64),
        )
        for number in numbers:
            first = support.first(number)
            _add_adaptation(golden, f"{name}-{number}", checkpoint, first, images)
    refused = support.first(1).feeds(checkpoint) | {"learning_rate": np.array(np.inf, np.float32)}
    golden.refuse("adapt", "refused", refused)
    golden.close()


def _add_adaptation(
    golden: Golden, folder: str, checkpoint: Checkpoint, support: SupportSet, images: Array
) -> None:
    """Add a case of each graph that adapts or predicts with adapted weights."""
    queries = images.astype(np.float32)
    adapted = [reference.adapt(checkpoint, support, dtype) for dtype in _PRECISIONS]
    predicted = [
        {"logits": reference.predict_adapted(checkpoint, tensors, images, dtype)}
        for tensors, dtype in zip(adapted, _PRECISIONS, strict=True)
    ]
    feeds = support.feeds(checkpoint)
    finite = {"finite": np.array(True)}
    golden.add("adapt", folder, feeds, adapted[0], adapted[1] | finite)
    weights = {name: value for name, value in adapted[1].items() if name != "losses"}
    golden.add("predict_adapted", folder, {"images": queries} | weights, *predicted)
    losses = [{"losses": tensors["losses"]} for tensors in adapted]
    golden.add(
        "few_shot",
        folder,
        feeds | {"query_images": queries},
        predicted[0] | losses[0],
        predicted[1] | losses[1] | finite,
    )
