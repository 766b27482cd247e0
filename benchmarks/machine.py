"""The machine that the figures are from, and whether other programs were running on it.

The load average is not enough, as it counts this program too. So the CPU time of other programs is
measured too, where the system reports it (Linux).
"""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from reptile.cpus import available_cpus

ROOT = Path(__file__).parent.parent
PACKAGES = ("numpy", "onnxruntime", "reptile-fewshot", "torch")


class Machine(BaseModel):
    """Where and with what a run was made."""

    model_config = ConfigDict(frozen=True)

    cpu: str
    cpus: int  # that this process may keep busy
    threads: int  # of torch and of the native engine
    wait_policy: str  # OMP_WAIT_POLICY
    governor: str | None  # of the first CPU's frequency, where the system reports it
    load_average: tuple[float, float, float]  # before the run, over 1, 5 and 15 minutes
    system: str
    versions: dict[str, str]
    commit: str | None
    changed: bool  # files differ from the commit


def describe_machine() -> Machine:
    """Describe this machine, before the run."""
    commit = _git("rev-parse", "HEAD")
    return Machine(
        cpu=_cpu_model(),
        cpus=available_cpus(),
        threads=torch.get_num_threads(),
        wait_policy=os.environ.get("OMP_WAIT_POLICY", "not set"),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        load_average=os.getloadavg(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions={"python": platform.python_version(), **_versions()},
        commit=commit,
        changed=bool(commit and _git("status", "--porcelain")),
    )


class OtherWork:
    """Counts from now on what share of our CPUs' time goes to other programs and machines."""

    def __init__(self) -> None:
        self._start = _ticks()

    def share(self) -> float | None:
        """Return it, 0..1; None where the system does not report it."""
        if self._start is None or (now := _ticks()) is None:
            return None
        total, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        return min(max((busy - own) / total, 0.0), 1.0) if total > 0 else None


def _ticks() -> tuple[float, float, float] | None:
    """All ticks of our CPUs, those not idle (also those stolen by a hypervisor), and our own."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        fields = [line.split() for line in lines]
        counts = [[int(n) for n in own[1:9]] for own in fields if own and own[0] in allowed]
        total = sum(sum(ticks) for ticks in counts)
        idle = sum(ticks[3] + ticks[4] for ticks in counts)  # the second is waiting for a disk
    except (OSError, AttributeError, ValueError, IndexError):  # no such file or not its form
        return None
    return total, total - idle, sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:  # onnxruntime has two names, and a checkout none
            continue
    return installed


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
