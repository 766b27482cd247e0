"""What to say while a run is waited for: a line whenever something has changed.

Nothing here asks a cluster or prints; whoever waits hands in the run each time it was looked at.
"""

import time
from collections.abc import Callable
from typing import Any

from pipeline.workflow import Task, tasks, waiting_pods, workflow_name

PATIENCE = 180.0  # seconds that a pod may take to start before a hint is given
_GOING_ON = ("RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "CANCELING")
_STATES = {
    "RUNTIME_STATE_UNSPECIFIED": "accepted",
    "CANCELING": "cancelling",
    "CANCELED": "cancelled",
}


def state(run: Any) -> str:
    """Return the state of a run as a word."""
    return _STATES.get(run.state, (run.state or "unknown").lower())


class Progress:
    """What has been said of a run so far.

    Args:
        pods: given the name of a run's workflow, returns what keeps each task from starting, by
            the task's name, or None if that cannot be learnt.
    """

    def __init__(self, pods: Callable[[str], dict[str, str] | None]):
        self._pods = pods
        self._state = ""
        self._tasks: dict[str, Task] = {}
        self._reasons: set[tuple[str, str]] = set()
        self._waiting_since: float | None = None
        self._hinted = False

    def news(self, run: Any) -> list[str]:
        """Return what has changed since the last look, a line each."""
        before, self._state = self._state, state(run)
        changed = [self._state] * (self._state != before)
        lines = []
        for task in tasks(run):
            lines += _changes(self._tasks.get(task.name), task)
            self._tasks[task.name] = task
        if lines:  # what waits now is perhaps another pod
            self._waiting_since = None
        if run.state in _GOING_ON:
            return [*changed, *lines, *self._waiting(run)]
        return [*lines, *changed]

    def _waiting(self, run: Any) -> list[str]:
        """Say what keeps pods from starting, or after a while that it is not known."""
        if not waiting_pods(run):
            self._waiting_since, self._hinted = None, False
            return []
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        workflow = workflow_name(run)
        reasons = self._pods(workflow)
        if reasons:
            new = {(name, why.partition(":")[0]) for name, why in reasons.items()} - self._reasons
            self._reasons |= new
            return [f"{name} cannot start: {reasons[name]}" for name, _ in sorted(new)]
        if self._hinted or now - self._waiting_since < PATIENCE:
            return []
        self._hinted = True
        running = [task.name for task in self._tasks.values() if task.state == "RUNNING"]
        return [
            f"{' or '.join(running) or 'a task'} has waited {PATIENCE / 60:g} minutes for its pod; "
            f"`kubectl describe pods -l workflows.argoproj.io/workflow={workflow}` says why"
        ]


def _changes(before: Task | None, task: Task) -> list[str]:
    lines = []
    if before is None and task.state == "RUNNING":
        lines.append(f"{task.name} started")
    if len(task.pods) > max(1, len(before.pods) if before else 0):
        lines.append(f"{task.name} is tried again (attempt {len(task.pods)})")
    if task.state != (before.state if before else "RUNNING"):
        lines.append(f"{task.name} {_ended(task)}")
    return lines


def _ended(task: Task) -> str:
    if task.state == "CACHED":
        return "taken from the cache"
    seconds = round((task.end - task.start).total_seconds()) if task.start and task.end else 0
    hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
    took = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
    return f"{task.state.lower()} after {took.removeprefix('0 min ')}"
