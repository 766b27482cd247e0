"""Threads by default: what the system grants, and what the environment says first."""

import os
import subprocess
import sys

import pytest

from reptile.cpus import available_cpus

THREADS = "from reptile.cpus import settle_threads; settle_threads(); import torch; {}"


def test_available_cpus_stay_within_the_machine() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_available_cpus_follow_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("said", "threads"), [("1", 1), (None, available_cpus())])
def test_torch_gets_the_environments_threads_or_all_that_are_granted(
    said: str | None, threads: int
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if said:
        environment["OMP_NUM_THREADS"] = said
    script = THREADS.format("print(torch.get_num_threads())")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert int(done.stdout) == threads


@pytest.mark.parametrize("policy", [None, "PASSIVE"])
def test_the_native_engine_warns_once_of_threads_that_spin(policy: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    script = "from reptile.cpus import *\n" + "warn_of_spinning_threads()\n" * 2
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("OMP_WAIT_POLICY=PASSIVE") == (policy is None)


def test_importing_the_library_leaves_the_process_alone() -> None:
    script = (
        "import os, sys\n"
        "before = dict(os.environ)\n"
        "import reptile, reptile.runtime\n"
        "assert dict(os.environ) == before\n"
        "assert not {'torch', 'pydantic', 'onnxruntime'} & set(sys.modules)\n"
        "import reptile.api, reptile.stages\n"
        "assert dict(os.environ) == before\n"
    )
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
