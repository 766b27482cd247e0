"""Why a run failed: the states of its tasks, pods' logs, and what Kubernetes says ended a pod.

Kubeflow's answers have no error texts, so the reason is the end of the failed pod's log. Nothing
here asks the cluster; whoever calls hands in the run, a function that reads logs, and the endings.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pipeline.workflow import tasks

REFUSED = "refused by the gate: "  # as the gate's component ends
LINES = 20  # of a log that are shown
_LAUNCHER = re.compile(r"([IWEF])\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] ?(.*)")
_CONTROL = re.compile(r"\x1b\[[\d;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Failure(NamedTuple):
    """A task that failed, by the pipeline's name for it, and the end of its log."""

    task: str
    log: tuple[str, ...]  # empty if there is none
    ending: str = ""  # what ended its pod from outside, as Kubernetes says, such as OOMKilled

    @property
    def refusal(self) -> str:
        """The gate's reason, if this is a refusal; else an empty text."""
        last = self.log[-1] if self.task == "gate" and self.log else ""
        return last.removeprefix(REFUSED) if last.startswith(REFUSED) else ""

    def __str__(self) -> str:
        failed = f"{self.task} failed" + f": {self.ending.rstrip('.')}" * bool(self.ending)
        if not self.log:
            return f"{failed}; no log of it can be read"
        return "\n  ".join([f"{failed}; its log ends:", *self.log])


def failures(run: Any, read_log: Callable[[str], str], endings: Mapping[str, str]) -> list[Failure]:
    """Return the failed tasks of a run, each by its last attempt.

    Args:
        run: as the API gives it.
        read_log: gives the log of a node of the run by its id, an empty text if there is none.
        endings: what ended pods from outside, by the node's id, as far as it is known.
    """
    last = [(t.name, t.pods[-1] if t.pods else "") for t in tasks(run) if t.state == "FAILED"]
    return [
        Failure(name, _end(read_log(node) if node else ""), endings.get(node, ""))
        for name, node in last
    ]


def _end(log: str) -> tuple[str, ...]:
    """Return the last lines of a task's own output, and how its process ended if that says more."""
    own: list[str] = []
    fatal, in_input = "", False
    for raw in log.splitlines():
        line = _CONTROL.sub("", raw).rstrip()
        launcher = _LAUNCHER.match(line)
        if launcher:
            fatal = launcher[2] if launcher[1] == "F" else fatal
        elif in_input:
            in_input = line != "}"
        elif line.startswith("[KFP Executor "):
            in_input = line.endswith("Got executor_input:")
        elif line:
            own.append(line)
    tells = bool(fatal) and not (own and fatal.endswith("exit status 1"))
    return tuple(own[-LINES:] + [fatal] * tells)
