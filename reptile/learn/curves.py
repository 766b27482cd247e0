"""Learning curves while training runs, as DVCLive files that `dvc plots` and `dvc exp` read."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from dvclive.live import Live

from reptile.learn.checkpoint import CurvePoint
from reptile.objectives import Objective


class CurveWriter:
    """Writes each point of a curve once; a resumed run's earlier points come with its curve."""

    def __init__(self, folder: Path, objective: Objective) -> None:
        self._name = f"validation_{objective.metric}"
        shutil.rmtree(folder, ignore_errors=True)
        self._live = Live(
            dir=str(folder), report=None, save_dvc_exp=False, dvcyaml=None, monitor_system=False
        )
        self._written = 0

    def write(self, curve: Sequence[CurvePoint]) -> None:
        """Write the points that are new since the last call."""
        for point in curve[self._written :]:
            self._live.step = point.iteration
            self._live.log_metric("loss", point.loss)
            self._live.log_metric(self._name, point.score)
            self._live.make_summary()
        self._written = len(curve)

    def __enter__(self) -> "CurveWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.end()
