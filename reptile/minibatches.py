"""The paper's mini-batch protocol as arrays of positions, shared by training and the runtime.

Not for choosing a task's images (see `tasks`); numpy only, so that the runtime can import it.
"""

import numpy as np
import numpy.typing as npt

from reptile.errors import InputError

IntArray = npt.NDArray[np.int64]


def mini_batches(
    rng: np.random.Generator, size: int, batch: int, steps: int, replacement: bool = False
) -> IntArray:
    """Draw the mini-batches of one inner loop as positions 0..size-1, int64 [steps, batch].

    Without replacement the set is shuffled and cycled: a batch that crosses the end carries over
    into the next shuffle, so it may be larger than the set and may hold a position twice. With
    replacement each batch is a fresh sample without repeats, which cannot be larger than the set.

    Source: `_mini_batches` in openai/supervised-reptile (Nichol et al., arXiv 1803.02999).

    Raises:
        InputError: `size` or `batch` below 1, `steps` below 0, or a sample larger than the set.
    """
    if size < 1 or batch < 1 or steps < 0:
        raise InputError(
            f"mini-batches need size >= 1, batch >= 1 and steps >= 0; "
            f"got size {size}, batch {batch}, steps {steps}"
        )
    if replacement and batch > size:
        raise InputError(
            f"a batch of {batch} cannot be sampled from {size} images without repeats: "
            f"lower the batch size to {size} or set replacement to false"
        )
    shuffles = steps if replacement else -(-steps * batch // size)
    order = rng.permuted(np.tile(np.arange(size, dtype=np.int64), (shuffles, 1)), axis=1)
    if replacement:
        return np.ascontiguousarray(order[:, :batch])
    return order.reshape(-1)[: steps * batch].reshape(steps, batch)
