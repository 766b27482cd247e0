"""Meta-training as a program, which the component `train` starts, also under torchrun.

`python -m components.training SETTINGS PREPARED CHECKPOINT CURVES WORK`: the settings as JSON
text, the others as paths. Exit codes are those of `reptile train` (docs/cli.md).
"""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from reptile import stages
from reptile.cpus import settle_threads
from reptile.errors import ReptileError, StoppedError
from reptile.learn.signals import stop_by_signal
from reptile.settings import TrainSettings, parse_settings

if TYPE_CHECKING:
    from reptile.learn.train import Progress


def main(settings: str, prepared: str, checkpoint: str, curves: str, work: str) -> None:
    """Meta-train; resume from the latest checkpoint below `work`, if this run has left one."""
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("reptile").setLevel(logging.INFO if first else logging.WARNING)
    settle_threads()  # before anything loads torch
    try:
        with stop_by_signal() as stop:
            stages.train(
                parse_settings(TrainSettings, settings),
                Path(prepared),
                Path(checkpoint),
                curves=Path(curves),
                work=Path(work),
                resume=True,
                on_progress=_Log(),
                stop=stop,
            )
    except StoppedError as stopped:
        if first:
            print(stopped, flush=True)
        sys.exit(stopped.exit_code)
    except ReptileError as error:
        print(f"error: {error}", flush=True)
        sys.exit(error.exit_code)


class _Log:
    """Prints where training starts, and each new point of its curve, as a pod's log shows it."""

    def __init__(self) -> None:
        self._shown = -1

    def __call__(self, progress: "Progress") -> None:
        if self._shown < 0:
            print(f"from meta-iteration {progress.iteration} of {progress.of}: {progress.engine}")
            self._shown = 0
        for point in progress.curve[self._shown :]:
            print(
                f"{point.iteration:>7} of {progress.of}: loss {point.loss:.3f}, "
                f"validation {progress.objective.title} {point.score:.3f}",
                flush=True,
            )
        self._shown = len(progress.curve)


if __name__ == "__main__":
    main(*sys.argv[1:])
