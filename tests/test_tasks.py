from time import process_time

import numpy as np
import pytest

from reptile.data.dataset import ClassRange, PreparedData
from reptile.errors import InputError
from reptile.settings import TrainSettings
from reptile.tasks import (
    FewShotProtocol,
    Purpose,
    check_classes,
    held_out_task,
    random_stream,
    sample_rows,
    training_tasks,
)


def class_of(rows: np.ndarray, data: PreparedData) -> np.ndarray:
    return rows // data.classes[0].count  # all classes of the fixture are equally large


def test_task_holds_different_images_of_the_right_classes(data: PreparedData) -> None:
    classes = data.split("test")
    protocol = FewShotProtocol(ways=5, shots=3, queries=2, steps=4, batch=5)
    task = held_out_task(random_stream(0, Purpose.EVALUATE, 0), classes, protocol)
    rows = np.concatenate([task.support, task.query])
    labels = np.concatenate([task.support_targets, task.query_targets])
    assert len(set(rows)) == 5 * (3 + 2)
    owners = class_of(rows, data)
    assert {data.classes[owner].split for owner in owners} == {"test"}
    pairs = set(zip(owners, labels, strict=True))
    assert len(pairs) == 5  # each class has one label and each label one class
    assert np.bincount(task.support_targets).tolist() == [3] * 5
    assert np.bincount(task.query_targets).tolist() == [2] * 5


def test_labels_are_dealt_afresh_for_each_task(data: PreparedData) -> None:
    train = data.split("train")
    classes = ClassRange(train.starts[:5], train.counts[:5])
    orders = {
        tuple(
            class_of(
                sample_rows(random_stream(0, Purpose.TRAIN, i), classes, 1, 5, 1)[0, :, 0], data
            )
        )
        for i in range(40)
    }
    assert len(orders) > 20  # of 120 possible


def test_a_meta_batch_depends_on_its_own_number_only(data: PreparedData) -> None:
    settings = TrainSettings(ways=3, train_shots=4)
    classes = data.split("train")
    alone = training_tasks(classes, settings, 7)
    for iteration in range(8):
        again = training_tasks(classes, settings, iteration)
    for one, other in zip(alone, again, strict=True):
        assert np.array_equal(one.support, other.support)
        assert all(map(np.array_equal, one.batches, other.batches))
    assert len({task.support.tobytes() for task in alone}) == len(alone)
    other = training_tasks(classes, settings.model_copy(update={"seed": 1}), 7)[2]
    assert not np.array_equal(alone[2].support, other.support)


def test_fomaml_tail_is_apart_from_the_other_mini_batches(data: PreparedData) -> None:
    settings = TrainSettings(ways=3, train_shots=6, algorithm="fomaml", tail_shots=2, inner_steps=5)
    task = training_tasks(data.split("train"), settings, 0)[0]
    assert len(task.batches) == 5
    tail, before = task.batches[-1], np.concatenate(task.batches[:-1])
    assert np.bincount(task.support_targets[tail]).tolist() == [2, 2, 2]
    assert not set(tail) & set(before)
    assert set(tail) | set(before) == set(range(18))


def test_unequal_classes_are_sampled_within_their_own_rows() -> None:
    classes = ClassRange(np.array([0, 4, 10]), np.array([4, 6, 5]))
    for seed in range(50):
        (rows,) = sample_rows(np.random.default_rng(seed), classes, 1, 3, 4)
        owner = np.searchsorted([4, 10], rows, side="right")
        assert (owner == owner[:, :1]).all()
        assert len(np.unique(rows)) == 12


def test_every_image_and_class_is_as_likely(data: PreparedData) -> None:
    classes = data.split("train")
    rng = np.random.default_rng(0)
    rows = sample_rows(rng, classes, 4000, 5, 3).ravel()
    counts = np.bincount(rows, minlength=classes.counts.sum())
    expected = len(rows) / classes.counts.sum()
    # Means of 240 cells, each within five standard deviations of a Poisson count.
    assert np.abs(counts[counts > 0] - expected).max() < 5 * expected**0.5


@pytest.mark.parametrize("images", [5, 40, 41, 42])  # all are ordered, or few drawn again, or both
def test_every_ordered_choice_of_images_is_as_likely(images: int) -> None:
    counts = np.array([images, 5])
    rows = sample_rows(np.random.default_rng(1), ClassRange(np.array([0, 0]), counts), 20000, 2, 5)
    assert rows.shape == (20000, 2, 5)
    assert (np.diff(np.sort(rows, axis=2)) > 0).all()  # no image twice
    of_large = rows[rows.max(2) >= 5] if images > 5 else rows.reshape(-1, 5)
    for first, second in ((0, 1), (3, 4)):
        pairs = of_large[:, first] * images + of_large[:, second]
        cells = np.bincount(pairs, minlength=images**2).reshape(images, images)
        assert not cells.diagonal().any()
        off = cells[~np.eye(images, dtype=bool)]
        assert np.abs(off - off.mean()).max() < 6 * off.mean() ** 0.5


@pytest.mark.parametrize(("ways", "images", "word"), [(9, 1, "8 classes"), (5, 21, "20 images")])
def test_a_split_too_small_for_the_task_is_refused(
    ways: int, images: int, word: str, data: PreparedData
) -> None:
    with pytest.raises(InputError, match=word):
        check_classes(data.split("test"), ways, images, "test split")


ORDERED = ClassRange(np.array([0, 20, 50]), np.array([20, 30, 9]), ordered=True)
PAST = FewShotProtocol(ways=2, shots=3, queries=5, steps=2, batch=4)


def test_in_evaluation_the_first_points_are_the_support_and_later_ones_the_queries() -> None:
    asked: dict[int, set[int]] = {0: set(), 20: set(), 50: set()}
    for number in range(300):
        task = held_out_task(random_stream(0, Purpose.EVALUATE, number), ORDERED, PAST)
        for support, query in zip(
            task.support.reshape(2, 3), task.query.reshape(2, 5), strict=True
        ):
            start = support[0]
            assert support.tolist() == [start, start + 1, start + 2]
            assert len(set(query)) == 5
            asked[start] |= set((query - start).tolist())
    assert {k: (min(v), max(v)) for k, v in asked.items()} == {0: (3, 19), 20: (3, 29), 50: (3, 8)}


def test_in_training_the_support_is_what_lies_before_any_cut() -> None:
    cuts = set()
    for number in range(300):
        rng = random_stream(0, Purpose.TRAIN, number)
        task = held_out_task(rng, ORDERED, PAST, any_cut=True)
        for support, query in zip(
            task.support.reshape(2, 3), task.query.reshape(2, 5), strict=True
        ):
            assert (np.diff(support) == 1).all() and query.min() > support[-1]
            place = int(np.searchsorted(ORDERED.starts, support[0], "right")) - 1
            assert query.max() < ORDERED.starts[place] + ORDERED.counts[place]
            cuts.add((place, int(support[0] - ORDERED.starts[place])))
    assert cuts == {(0, i) for i in range(13)} | {(1, i) for i in range(23)} | {(2, 0), (2, 1)}


def test_a_fomaml_tail_is_the_future_of_the_batches_before_it() -> None:
    settings = TrainSettings(
        algorithm="fomaml", ways=2, train_shots=6, tail_shots=2, inner_steps=4, inner_batch=8
    )
    for task in training_tasks(ORDERED, settings, 0):
        rows, labels = task.support, task.support_targets
        tail, before = task.batches[-1], np.concatenate(task.batches[:-1])
        for label in range(2):
            late, early = (rows[part][labels[part] == label] for part in (tail, before))
            assert late.min() > early.max()


@pytest.mark.parametrize("ordered", [False, True])
def test_the_time_to_draw_a_task_does_not_grow_with_the_number_of_tasks(ordered: bool) -> None:
    def seconds(count: int) -> float:
        classes = ClassRange(np.arange(count) * 10, np.full(count, 10), ordered=ordered)
        rng = np.random.default_rng(0)
        times = []
        for _ in range(5):
            start = process_time()
            for _ in range(100):
                held_out_task(rng, classes, PAST, any_cut=True)
            times.append(process_time() - start)
        return min(times)

    assert seconds(1_000_000) < 4 * seconds(1000)
