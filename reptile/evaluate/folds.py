"""Cross-validation over classes: the data without a part of them, and learners trained on that."""

from collections.abc import Iterator
from dataclasses import replace

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.evaluate.adapting import engine_on
from reptile.learn.algorithms import algorithm_of
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.engines import choose_device
from reptile.learn.train import check_tasks, meta_train
from reptile.models import initialise
from reptile.tasks import Purpose, random_stream


def parts(data: PreparedData, folds: int, seed: int) -> Iterator[PreparedData]:
    """Yield the data once for each part of its training and validation classes.

    That part, without turned copies, is the validation split; the others are the training split.
    A table's coding stays that of all training classes.

    Raises:
        InputError: fewer classes than parts.
    """
    names = sorted({entry.name for entry in data.classes if entry.split != "test"})
    if len(names) < folds:
        raise InputError(
            f"evaluate.folds = {folds}: {data.name} has {len(names)} classes for training and "
            "validation; lower it"
        )
    shuffled = random_stream(seed, Purpose.CHOOSE).permutation(names)
    for fold in range(folds):
        held = set(shuffled[fold::folds])
        classes = tuple(
            entry
            if entry.split == "test"
            else entry.model_copy(update={"split": "validation" if entry.name in held else "train"})
            for entry in data.classes
            if not (entry.name in held and entry.rotation)
        )
        yield replace(data, index=data.index.model_copy(update={"classes": classes}))


def trained_again(checkpoint: Checkpoint, data: PreparedData) -> Checkpoint:
    """Return what the checkpoint's training gives on another training split.

    Raises:
        InputError: the split cannot make the tasks.
        DivergedError: the loss is no longer finite.
    """
    model, settings, info = checkpoint.model, checkpoint.info.settings, checkpoint.info
    check_tasks(settings, data, "a fold's training split")
    classes = data.split("train")
    info = info.model_copy(
        update={
            "iteration": 0,
            "settings": settings.model_copy(update={"checkpoint_every": settings.meta_iterations}),
            "classes": len(classes.starts) if settings.algorithm == "pretrain" else 0,
            "curve": (),
            "losses": (),
            "shares": (),
        }
    )
    algorithm = algorithm_of(settings, model, info.values, info.classes)
    state = algorithm.start(initialise(model, settings.seed)).to(choose_device(settings.device))
    return meta_train(engine_on(checkpoint, data), Checkpoint(model, state, info), data)
