import numpy as np
import pytest

from reptile.config import TrainSettings
from reptile.data.prepared import ClassRange, PreparedData
from reptile.episodes import (
    FewShotProtocol,
    Purpose,
    check_classes,
    held_out_task,
    random_stream,
    sample_rows,
    training_task,
)
from reptile.errors import InputError


def class_of(rows: np.ndarray, data: PreparedData) -> np.ndarray:
    return rows // data.classes[0].count  # all classes of the fixture are equally large


def test_task_holds_different_images_of_the_right_classes(data: PreparedData) -> None:
    classes = data.split("test")
    protocol = FewShotProtocol(ways=5, shots=3, queries=2, steps=4, batch=5)
    task = held_out_task(random_stream(0, Purpose.EVALUATE, 0), classes, protocol)
    rows = np.concatenate([task.support, task.query])
    labels = np.concatenate([task.support_labels, task.query_labels])
    assert len(set(rows)) == 5 * (3 + 2)
    owners = class_of(rows, data)
    assert {data.classes[owner].split for owner in owners} == {"test"}
    pairs = set(zip(owners, labels, strict=True))
    assert len(pairs) == 5  # each class has one label and each label one class
    assert np.bincount(task.support_labels).tolist() == [3] * 5
    assert np.bincount(task.query_labels).tolist() == [2] * 5


def test_labels_are_dealt_afresh_for_each_task(data: PreparedData) -> None:
    classes = ClassRange(*(part[:5] for part in data.split("train")[:2]))
    orders = {
        tuple(class_of(sample_rows(random_stream(0, Purpose.TRAIN, i), classes, 5, 1)[:, 0], data))
        for i in range(40)
    }
    assert len(orders) > 20  # of 120 possible


def test_a_task_depends_on_its_own_numbers_only(data: PreparedData) -> None:
    settings = TrainSettings(ways=3, train_shots=4)
    classes = data.split("train")
    alone = training_task(classes, settings, 7, 2)
    for number in range(3):
        again = training_task(classes, settings, 7, number)
    assert np.array_equal(alone.support, again.support)
    assert all(map(np.array_equal, alone.batches, again.batches))
    other = training_task(classes, settings.model_copy(update={"seed": 1}), 7, 2)
    assert not np.array_equal(alone.support, other.support)


def test_fomaml_tail_is_apart_from_the_other_mini_batches(data: PreparedData) -> None:
    settings = TrainSettings(ways=3, train_shots=6, algorithm="fomaml", tail_shots=2, inner_steps=5)
    task = training_task(data.split("train"), settings, 0, 0)
    assert len(task.batches) == 5
    tail, before = task.batches[-1], np.concatenate(task.batches[:-1])
    assert np.bincount(task.support_labels[tail]).tolist() == [2, 2, 2]
    assert not set(tail) & set(before)
    assert set(tail) | set(before) == set(range(18))


def test_unequal_classes_are_sampled_within_their_own_rows() -> None:
    classes = ClassRange(np.array([0, 4, 10]), np.array([4, 6, 5]))
    for seed in range(50):
        rows = sample_rows(np.random.default_rng(seed), classes, 3, 4)
        owner = np.searchsorted([4, 10], rows, side="right")
        assert (owner == owner[:, :1]).all()
        assert len(np.unique(rows)) == 12


def test_every_image_and_class_is_as_likely(data: PreparedData) -> None:
    classes = data.split("train")
    rng = np.random.default_rng(0)
    rows = np.concatenate([sample_rows(rng, classes, 5, 3).ravel() for _ in range(4000)])
    counts = np.bincount(rows, minlength=classes.count.sum())
    expected = len(rows) / classes.count.sum()
    # Means of 240 cells, each within five standard deviations of a Poisson count.
    assert np.abs(counts[counts > 0] - expected).max() < 5 * expected**0.5


@pytest.mark.parametrize(("ways", "images", "word"), [(9, 1, "8 classes"), (5, 21, "20 images")])
def test_a_split_too_small_for_the_task_is_refused(
    ways: int, images: int, word: str, data: PreparedData
) -> None:
    with pytest.raises(InputError, match=word):
        check_classes(data.split("test"), ways, images, "test split")
