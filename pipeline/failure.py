"""Why a run failed, from what Kubeflow Pipelines tells: the states of its tasks, and pods' logs.

Its answers have no error texts, so the reason is the end of the failed pod's log. Nothing here asks
the cluster; whoever calls hands in the run and a function that reads logs.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

REFUSED = "refused by the gate: "  # as the gate's component ends
LINES = 20  # of a log that are shown
_GROUP = re.compile(
    r"root|exit-handler-\d+|condition(-branches)?-\d+|for-loop-\d+|iteration-.*|.*\.onExit"
)
_LAUNCHER = re.compile(r"([IWEF])\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] ?(.*)")
_COMPONENT = re.compile(r"\[KFP Executor .*Loading KFP component \"([\w-]+)\"")
_CONTROL = re.compile(r"\x1b\[[\d;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Failure(NamedTuple):
    """A task that failed, by the pipeline's name for it, and the end of its log."""

    task: str
    log: tuple[str, ...]  # empty if there is none

    @property
    def refusal(self) -> str:
        """The gate's reason, if this is a refusal; else an empty text."""
        last = self.log[-1] if self.task == "gate" and self.log else ""
        return last.removeprefix(REFUSED) if last.startswith(REFUSED) else ""

    def __str__(self) -> str:
        if not self.log:
            return f"{self.task} failed; no log of it can be read"
        return "\n  ".join([f"{self.task} failed; its log ends:", *self.log])


def failures(run: Any, read_log: Callable[[str], str]) -> list[Failure]:
    """Return the failed tasks of a run.

    Args:
        run: as the API gives it.
        read_log: gives the log of a node of the run by its id, an empty text if there is none.
    """
    found: dict[str, Failure] = {}
    for name, node in _failed_pods(run):
        text = read_log(node)
        component = _COMPONENT.search(text)
        task = component[1] if component else name
        if task and task not in found:
            found[task] = Failure(task, _end(text))
    for name in _failed_tasks(run):  # also those of which no log is left
        found.setdefault(name, Failure(name, ()))
    return list(found.values())


def _failed(run: Any) -> Iterator[tuple[str, str]]:
    """Yield name and last child of what failed, without the attempts, which are called `x(n)`."""
    for task in (run.run_details and run.run_details.task_details) or ():
        name = task.display_name or ""
        if task.state == "FAILED" and name and not name.endswith(")"):
            children = [child.pod_name for child in task.child_tasks or () if child.pod_name]
            yield name, children[-1] if children else ""


def _failed_pods(run: Any) -> list[tuple[str, str]]:
    """Return task (empty if only the log says which) and node of each failed pod.

    A node has the retries of one pod as its children, the last one last. Where Argo retries nothing
    (KFP up to 2.16), the pod is the task's own child.
    """
    failed = list(_failed(run))
    pods = [("", node) for name, node in failed if name == "executor" and node]
    pods = pods or [(name, node) for name, node in failed if node and name in _failed_tasks(run)]
    drivers = [(name, node) for name, node in failed if name.endswith("-driver")]
    return [*pods, *((f"the driver of {n.removesuffix('-driver')}", node) for n, node in drivers)]


def _failed_tasks(run: Any) -> list[str]:
    """Return the failed tasks; groups, pods and the workflow itself are none of the pipeline's."""
    return [
        name
        for name, node in _failed(run)
        if not (name == "executor" or name.endswith("-driver") or _GROUP.fullmatch(name))
        and not node.startswith(f"{name}-")  # the workflow's name begins those of its nodes
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
