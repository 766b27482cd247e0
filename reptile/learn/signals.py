"""Stopping a training by a signal, after its meta-iteration and with a checkpoint."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

MESSAGE = b"stopping after this meta-iteration\n"


@contextmanager
def stop_by_signal() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the signal that has asked this process to stop; 0 if none has.

    SIGTERM, however often it comes, and the first SIGINT only ask. A second SIGINT interrupts at
    once. For the main thread only, as Python's signal handlers are.
    """
    asked = 0

    def ask(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            os.write(2, MESSAGE)  # print would fail if the signal came while it was at work
        asked = asked or number

    before = {each: signal.signal(each, ask) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
