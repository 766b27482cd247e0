"""The number of processors available, and thread settings for shared ones."""

import logging
import math
import os
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)


def settle_threads() -> None:
    """Set the defaults of OpenMP for this process and its children; the environment wins.

    For programs, before they load torch, which reads them then. As many threads as the process may
    keep busy, and threads that sleep at a barrier: spinning ones slow everything down a
    hundredfold when another process shares the cores, and the native engine, which has its own
    threads, threefold. A library must not change its process, so importing `reptile` does not.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cpus()))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@cache
def warn_of_spinning_threads() -> None:
    """Warn once if torch's threads spin, which slows the native engine's threads down."""
    if "OMP_WAIT_POLICY" not in os.environ:
        log.warning(
            "torch's threads spin between operations, so training may take three times as long; "
            "start Python with OMP_WAIT_POLICY=PASSIVE in its environment"
        )


def available_cpus() -> int:
    """Return how many processors this process may keep busy: its affinity and its cgroup's quota.

    torch's default number of threads ignores the quota, and a container that runs more
    threads than its quota is stopped for most of the time.
    """
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cpus = os.cpu_count() or 1
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            values = Path(quota_file).read_text().split()
            if period_file:
                values += Path(period_file).read_text().split()
            quota, period = (int(value) for value in values)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if quota > 0 and period > 0:
            return max(1, min(cpus, math.ceil(quota / period)))
    return cpus
