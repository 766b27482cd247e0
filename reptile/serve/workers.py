"""The threads that adapt and predict, each behind a bound, neither in the way of the other.

Adaptations wait in a short queue and run at a lower priority. Predictions of one task that arrive
while one runs are run together next: nothing waits for a batch to fill.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from reptile.errors import InputError
from reptile.runtime import AdaptedModel, AdaptedRegressor
from reptile.runtime.model import softmax
from reptile.serve.settings import ServeSettings

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Result = TypeVar("Result")

LEVEL = 0.95  # of intervals, unless a request gives another
IMAGES_AT_ONCE = 32  # of several requests: so few that others are read while these are run
OFTEN = 256  # images that a task was asked for before it gets a graph of its own
MOST_OWN = 16  # graphs of tasks' own; the one used longest ago goes first
LOWER = 10  # of nice's 0..19


class BusyError(Exception):
    """A queue is full; try again in so many seconds."""

    def __init__(self, what: str, seconds: int) -> None:
        super().__init__(f"{what}: try again in {seconds} s")
        self.seconds = seconds


class Adapter:
    """Runs adaptations in threads of its own."""

    def __init__(self, settings: ServeSettings) -> None:
        self._most = settings.adaptations + settings.waiting_adaptations
        self._seconds = settings.request_seconds
        self._pool = ThreadPoolExecutor(settings.adaptations, "adapt", _lower_priority)
        self.pending = 0  # running and waiting
        self._last = 1.0  # seconds that the latest one took

    async def run(self, work: Callable[[float], Result]) -> Result:
        """Run `work`, given the seconds that are left to it once it starts.

        Raises:
            BusyError: the queue is full.
        """
        if self.pending >= self._most:
            raise BusyError("too many adaptations are waiting", max(1, round(self._last)))
        until = time.monotonic() + self._seconds

        def timed() -> Result:
            start = time.monotonic()
            try:
                return work(until - start)
            finally:
                self._last = time.monotonic() - start

        future = self._pool.submit(timed)
        self.pending += 1
        loop = asyncio.get_running_loop()
        future.add_done_callback(partial(_from_thread, loop, self._done))
        return await asyncio.wrap_future(future)

    def _done(self) -> None:
        self.pending -= 1

    def close(self) -> None:
        """Wait for what runs, and drop what waits."""
        self._pool.shutdown(cancel_futures=True)


class Prediction(NamedTuple):
    """The prediction for N images or other inputs of a classifier."""

    probabilities: Array  # [N, names]
    logits: Array  # [N, names]


class Values(NamedTuple):
    """The prediction for N inputs of a regressor."""

    values: Array  # [N, outputs]
    low: Array | None  # [N, outputs]; as `high` the interval's end, of a closed-form learner
    high: Array | None


Outputs = Prediction | Values


class _Waiting(NamedTuple):
    images: Array
    answer: "asyncio.Future[Outputs]"


class _Batch(NamedTuple):
    """What predictions that are run together have in common."""

    model: AdaptedModel | AdaptedRegressor
    dtype: np.dtype[Any]  # of the images
    level: float  # of a regressor's intervals


class Predictor:
    """Predicts in a thread of its own, all that waits for one task in one run."""

    def __init__(self, settings: ServeSettings) -> None:
        self._most = settings.waiting_images
        self._pool, self._hot = ThreadPoolExecutor(1, "predict"), _Hot()
        self._waiting: dict[_Batch, list[_Waiting]] = {}
        self._running: set[_Batch] = set()
        self.images = 0  # running and waiting

    async def predict(
        self, model: AdaptedModel | AdaptedRegressor, images: Array, level: float = LEVEL
    ) -> Outputs:
        """Predict for checked images [N, C, H, W] or other inputs.

        Args:
            model: a task's.
            images: as its runtime takes them.
            level: the probability of a regressor's intervals, between 0 and 1.

        Raises:
            BusyError: too many images are waiting.
        """
        if self.images and self.images + len(images) > self._most:
            raise BusyError("too many images are waiting for a prediction", 1)
        self.images += len(images)
        try:
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[Outputs] = loop.create_future()
            batch = _Batch(model, images.dtype, level)
            if batch not in self._waiting:
                self._waiting[batch] = []
                loop.call_soon(self._start, batch)  # once all that has arrived by now is read
            self._waiting[batch].append(_Waiting(images, answer))
            return await answer
        finally:
            self.images -= len(images)

    def _start(self, batch: _Batch) -> None:
        if batch in self._running or batch not in self._waiting:
            return
        waiting, size, count = self._waiting[batch], 0, 0
        for one in waiting:
            if count and size + len(one.images) > IMAGES_AT_ONCE:
                break
            size, count = size + len(one.images), count + 1
        first, rest = waiting[:count], waiting[count:]
        if rest:
            self._waiting[batch] = rest
        else:
            del self._waiting[batch]
        self._running.add(batch)
        images = np.concatenate([one.images for one in first])
        future = self._pool.submit(self._hot.predict, batch.model, images, batch.level)
        loop = asyncio.get_running_loop()
        future.add_done_callback(partial(_from_thread, loop, self._finish, batch, first, future))

    def _finish(self, batch: _Batch, first: list[_Waiting], future: "Future[Outputs]") -> None:
        self._running.discard(batch)
        error, start = future.exception(), 0
        for one in first:
            own = slice(start, start + len(one.images))
            if one.answer.cancelled():
                pass
            elif error:
                one.answer.set_exception(error)
            else:
                one.answer.set_result(_part(future.result(), own))
            start = own.stop
        self._start(batch)

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown()


def _part(outputs: Outputs, part: slice) -> Outputs:
    arrays = outputs._asdict().items()
    return outputs._replace(**{key: each[part] for key, each in arrays if each is not None})


class _Hot:
    """Gives the tasks that are asked most a graph of their own; for one thread."""

    def __init__(self) -> None:
        # Weak, so that a task that is forgotten takes both with it.
        self._asked: WeakKeyDictionary[AdaptedModel, int] = WeakKeyDictionary()
        self._own: WeakKeyDictionary[AdaptedModel, AdaptedModel] = WeakKeyDictionary()

    def predict(
        self, model: AdaptedModel | AdaptedRegressor, images: Array, level: float = LEVEL
    ) -> Outputs:
        if isinstance(model, AdaptedRegressor):
            closed_form = model.bundle.learner == "closed_form"
            interval = model.predict_interval(images, level) if closed_form else (None, None)
            return Values(model.predict(images), *interval)
        logits = self._fastest(model, len(images)).logits(images)
        return Prediction(softmax(logits), logits)

    def _fastest(self, model: AdaptedModel, images: int) -> AdaptedModel:
        if own := self._own.pop(model, None):
            self._own[model] = own  # the last of them
            return own
        self._asked[model] = self._asked.get(model, 0) + images
        if self._asked[model] < OFTEN:
            return model
        self._asked[model] = 0
        try:
            own = model.specialized()
        except InputError as error:  # such as a bundle that was replaced in its folder
            log.warning("a task is answered more slowly than it could be: %s", error)
            return model
        if len(self._own) == MOST_OWN:
            self._own.pop(next(iter(self._own)))
        self._own[model] = own
        return own


def _from_thread(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: Any
) -> None:
    """Call back in the event loop; a future's own argument comes last and is left out."""
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(callback, *arguments[:-1])


def _lower_priority() -> None:
    with contextlib.suppress(AttributeError, OSError):  # a thread's own, which only Linux has
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWER)
