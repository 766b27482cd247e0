"""Running a command in a process of its own, and again if it dies of no fault of its input.

Kubeflow's retries depend on the release and start another pod; this stays inside the pod.
"""

import signal
import subprocess
from collections.abc import Sequence
from threading import Event
from types import FrameType

RESTARTS = 3
PAUSE = 5.0  # seconds before a restart
FINAL = range(2, 8)  # exit codes of the errors in reptile.errors: the same command fails again


def supervise(command: Sequence[str], restarts: int = RESTARTS, pause: float = PAUSE) -> None:
    """Run a command to its end; start it again if a signal or an unexpected error ends it.

    SIGTERM is passed on and ends the supervision with the command. SIGINT is not passed on: a
    terminal sends it to the command too. For the main thread only.

    Raises:
        SystemExit: the command has failed for good, with its exit code, or 128 + its signal.
    """
    asked = Event()
    process: subprocess.Popen[bytes] | None = None

    def ask(number: int, _: FrameType | None) -> None:
        asked.set()
        if process and number == signal.SIGTERM:
            process.terminate()

    before = {each: signal.signal(each, ask) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        for restart in range(1, restarts + 2):
            process = subprocess.Popen(command)
            if asked.is_set():  # the signal came before there was a process to pass it on to
                process.terminate()
            code = process.wait()
            if code == 0:
                return
            if asked.is_set() or code in FINAL or restart > restarts:
                break
            print(
                f"{_ending(code)}; starting again from the latest checkpoint "
                f"(restart {restart} of {restarts})",
                flush=True,
            )
            if asked.wait(pause):
                break
        raise SystemExit(code if code > 0 else 128 - code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ending(code: int) -> str:
    if code > 0:
        return f"the process failed with exit code {code}"
    name = signal.Signals(-code).name
    memory = ", which the system sends when memory is short" if name == "SIGKILL" else ""
    return f"the process was killed by {name}{memory}"
