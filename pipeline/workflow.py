"""The tasks of a run, by the pipeline's names, from the workflow nodes that the API lists.

A task of the pipeline is several nodes of an Argo workflow: `train-driver` (Kubeflow's own pod
before it), `train`, in it `executor`, and where Argo may retry, `executor(0)`, `executor(1)` for
the attempts. The API gives the display name of a node, its state and the ids of its children, but
neither its own id nor its parent. Argo makes the id of a node from its full name, though, which is
the names on the path to it: so full names are tried until every id is known.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

_DRIVER = "-driver"
_ITERATION = re.compile(r"\.iteration-iterations\((\d+):")
_ATTEMPT = re.compile(r"\(\d+\)")
_LAST = re.compile(r"(\([\d:]+\)|\.[^.()]+)$")


class Task(NamedTuple):
    """A task that has begun, or the driver before it that failed."""

    name: str  # `measure 2` for the second iteration of a loop
    state: str  # RUNNING, SUCCEEDED, CACHED, FAILED, or another of the API's
    pods: tuple[str, ...]  # ids of the nodes of its attempts, as the log route takes them
    start: datetime | None = None
    end: datetime | None = None


def workflow_name(run: Any) -> str:
    """Return the name of the run's workflow, or "" as long as it has no nodes."""
    ids = _children_of(_nodes(run))
    return min(ids).rpartition("-")[0] if ids else ""


def tasks(run: Any) -> list[Task]:
    """Return the tasks of a run that have begun, in the order in which they did.

    Args:
        run: as the API gives it.
    """
    nodes = _nodes(run)
    ids = _ids(workflow_name(run), nodes)
    names = {node_id: full for full, node_id in ids.items()}
    begun = []
    for node in nodes:
        full = _full_name(node, names)
        if full is None or full.endswith(")") or not node.state:  # without a state: left out
            continue
        name, times = task_name(full), (node.start_time, node.end_time)
        executor = f"{full}(0).executor" if f"{full}(0)" in ids else f"{full}.executor"
        if full.endswith(_DRIVER):
            if node.state == "FAILED":
                begun.append(Task(name, "FAILED", _pods(full, ids), *times))
        elif executor in ids:
            cached = node.state == "SUCCEEDED" and times[0] == times[1]  # it had no pod
            state = "CACHED" if cached else node.state
            begun.append(Task(name, state, () if cached else _pods(executor, ids), *times))
    return sorted(begun, key=lambda task: (str(task.start), task.name))


def task_name(full: str) -> str:
    """Return the pipeline's name for the task that a node, by its full name, belongs to."""
    path = _ATTEMPT.sub("", full).removesuffix(".executor")
    iterations = _ITERATION.findall(path)
    name = path.rpartition(".")[2]
    if iterations:
        name = f"{name.removesuffix(_DRIVER)} {int(iterations[-1]) + 1}"
    return f"the driver of {name.removesuffix(_DRIVER)}" if path.endswith(_DRIVER) else name


def waiting_pods(run: Any) -> int:
    """Return how many pods of a run have been asked for and have not started."""
    return sum(node.state == "PENDING" for node in _nodes(run))


def _nodes(run: Any) -> list[Any]:
    nodes = (run.run_details and run.run_details.task_details) or ()
    return [node for node in nodes if node.display_name]


def _children(node: Any) -> list[str]:
    return [child.pod_name for child in node.child_tasks or () if child.pod_name]


def _children_of(nodes: Iterable[Any]) -> set[str]:
    return {child for node in nodes for child in _children(node)}


def _fnv(text: str, digest: int = 0x811C9DC5) -> int:
    """Return the 32-bit FNV-1a hash of a text, or of one that goes on from another's."""
    for byte in text.encode():
        digest = (digest ^ byte) * 0x01000193 & 0xFFFFFFFF
    return digest


def _ids(workflow: str, nodes: list[Any]) -> dict[str, str]:
    """Return the ids of nodes by their full names, from the workflow itself downwards."""
    ids = _children_of(nodes)
    # An attempt or an iteration has its parent's name with a number, any other a name after a dot.
    endings = {
        name[name.rindex("(") :] if name.endswith(")") else f".{name}"
        for name in (node.display_name for node in nodes)
    }
    found: dict[str, str] = {}
    parents = [(workflow, _fnv(workflow))]
    while parents:
        parent, digest = parents.pop()
        for ending in endings:
            own = _fnv(ending, digest)
            if (node_id := f"{workflow}-{own}") in ids:
                found[parent + ending] = node_id
                parents.append((parent + ending, own))
    return found


def _full_name(node: Any, names: Mapping[str, str]) -> str | None:
    """Return the full name of a node: by its children, or as the only one of that name."""
    ending = f".{node.display_name}"
    inside = {_LAST.sub("", names[child]) for child in _children(node) if child in names}
    fitting = [full for full in inside if full.endswith(ending)]
    if not fitting:
        fitting = [full for full in names.values() if full.endswith(ending)]
    return fitting[0] if len(fitting) == 1 else None


def _pods(full: str, ids: Mapping[str, str]) -> tuple[str, ...]:
    """Return the ids of a pod's attempts, or of the pod itself where Argo does not retry."""
    attempts = tuple(ids[name] for n in range(len(ids)) if (name := f"{full}({n})") in ids)
    return attempts or ((ids[full],) if full in ids else ())
