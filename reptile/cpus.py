"""How many processors there are for us, and threads that behave on shared ones.

To be imported before torch, so nothing here imports it.
"""

import logging
import math
import os
import sys
from pathlib import Path

log = logging.getLogger(__name__)
_late = False  # torch had read its settings before we made them


def settle_threads() -> None:
    """Set the defaults of OpenMP, which torch reads when it is loaded; the environment wins.

    As many threads as this process may keep busy, and threads that sleep at a barrier: spinning
    ones slow everything down a hundredfold when another process shares the cores, and the native
    engine, which has threads of its own, threefold.
    """
    global _late
    _late = "torch" in sys.modules and "OMP_WAIT_POLICY" not in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cpus()))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def warn_of_spinning_threads() -> None:
    """Say once if torch was loaded before us, with threads that spin."""
    global _late
    if _late:
        _late = False
        log.warning(
            "torch was imported before reptile, so its threads spin between operations: training "
            "may take three times as long; import reptile first, or set OMP_WAIT_POLICY=PASSIVE"
        )


def available_cpus() -> int:
    """Return how many processors this process may keep busy: its affinity and its cgroup's quota.

    torch's default number of threads knows nothing of the quota, and a container that runs more
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
