import random

import numpy as np
import pytest

from reptile.errors import InputError
from reptile.minibatches import mini_batches


def reference(shuffles: list[list[int]], batch: int, steps: int) -> list[list[int]]:
    """`_mini_batches` of openai/supervised-reptile, with the shuffles handed in."""
    batches: list[list[int]] = []
    current: list[int] = []
    for samples in shuffles:
        for sample in samples:
            current.append(sample)
            if len(current) < batch:
                continue
            batches.append(current)
            current = []
            if len(batches) == steps:
                return batches
    return batches


CASES = [(5, 5, 4), (10, 5, 7), (7, 3, 10), (3, 7, 5), (25, 10, 8), (1, 4, 3), (4, 1, 9)]


@pytest.mark.parametrize(("size", "batch", "steps"), CASES)
def test_batches_are_the_references_given_the_same_shuffles(
    size: int, batch: int, steps: int
) -> None:
    # A stream cut after whole shuffles shows the shuffles that were drawn.
    whole = -(-steps * batch // size)
    shuffles = mini_batches(np.random.default_rng(0), size, size, whole).tolist()
    assert all(sorted(shuffle) == list(range(size)) for shuffle in shuffles)
    drawn = mini_batches(np.random.default_rng(0), size, batch, steps)
    assert drawn.tolist() == reference(shuffles, batch, steps)


@pytest.mark.parametrize(("size", "batch", "steps"), CASES)
def test_each_round_of_the_stream_is_a_permutation(size: int, batch: int, steps: int) -> None:
    drawn = mini_batches(np.random.default_rng(1), size, batch, steps)
    assert drawn.shape == (steps, batch) and drawn.dtype == np.int64
    stream = drawn.ravel().tolist()
    for start in range(0, len(stream), size):
        block = stream[start : start + size]
        assert len(set(block)) == len(block)  # the last round may be cut short
    assert set(stream) <= set(range(size))


def test_a_small_set_is_shuffled_in_all_ways() -> None:
    drawn = mini_batches(np.random.default_rng(2), 3, 3, 200)
    assert len(set(map(tuple, drawn.tolist()))) == 6


def test_replacement_samples_each_batch_afresh_without_repeats() -> None:
    drawn = mini_batches(np.random.default_rng(3), 6, 4, 50, replacement=True)
    assert drawn.shape == (50, 4) and drawn.flags.c_contiguous
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    rounds = drawn.ravel()[:198].reshape(33, 6).tolist()
    assert any(len(set(block)) < 6 for block in rounds)  # no carrying over between batches


def test_replacement_larger_than_the_set_is_refused_as_in_the_reference() -> None:
    with pytest.raises(ValueError):
        random.sample(range(3), 4)  # what the reference calls
    with pytest.raises(InputError, match="batch of 4 cannot be sampled from 3"):
        mini_batches(np.random.default_rng(0), 3, 4, 1, replacement=True)


@pytest.mark.parametrize("replacement", [False, True])
def test_no_steps_give_no_rows(replacement: bool) -> None:
    assert mini_batches(np.random.default_rng(0), 5, 2, 0, replacement).shape == (0, 2)


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_sizes_that_make_no_sense_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="size >= 1, batch >= 1 and steps >= 0"):
        mini_batches(np.random.default_rng(0), *arguments)


def test_the_seed_alone_decides() -> None:
    first, again, other = (mini_batches(np.random.default_rng(s), 9, 4, 5) for s in (4, 4, 5))
    assert (first == again).all()
    assert (first != other).any()
