"""A command is started again after a passing fault, and not after an error of its input."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.supervise import supervise

PROGRAM = """
import os, signal, sys
from pathlib import Path
starts = Path(sys.argv[1])
starts.open("a").write("x")
number = len(starts.read_text()) - 1
end = sys.argv[2:][number]
if end.startswith("-"):
    os.kill(os.getpid(), int(end[1:]))
sys.exit(int(end))
"""


def starts_of(tmp_path: Path, *ends: object) -> int:
    """Run a program whose starts end in these ways; return how often it was started."""
    starts = tmp_path / "starts"
    try:
        supervise([sys.executable, "-c", PROGRAM, str(starts), *map(str, ends)], pause=0)
    finally:
        count = len(starts.read_text())
    return count


def test_a_killed_process_is_started_again_until_it_ends_well(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert starts_of(tmp_path, -signal.SIGKILL, 1, -signal.SIGSEGV, 0) == 4
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("the process was killed by SIGKILL, which the system sends when ")
    assert lines[1].startswith("the process failed with exit code 1; starting again")
    assert lines[2].endswith("SIGSEGV; starting again from the latest checkpoint (restart 3 of 3)")


@pytest.mark.parametrize(
    ("end", "code"), [(-signal.SIGKILL, 137), (1, 1), (-signal.SIGTERM, 143), (139, 139)]
)
def test_it_is_given_up_after_three_restarts_with_the_last_ending(
    end: int, code: int, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        starts_of(tmp_path, end, end, end, end, 0)
    assert ended.value.code == code
    assert (tmp_path / "starts").read_text() == "xxxx"


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6, 7])
def test_an_error_of_the_input_is_not_tried_again(code: int, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        starts_of(tmp_path, code, 0)
    assert ended.value.code == code
    assert (tmp_path / "starts").read_text() == "x"


def test_the_codes_that_end_it_are_those_of_the_projects_errors() -> None:
    from components.supervise import FINAL
    from reptile import errors

    classes = errors.ReptileError.__subclasses__()
    assert set(FINAL) == {each.exit_code for each in classes} - {errors.StoppedError.exit_code}


@pytest.mark.parametrize("moment", ["while it runs", "between two starts"])
def test_sigterm_reaches_the_command_and_ends_the_supervision(
    moment: str, tmp_path: Path, root: Path
) -> None:
    running = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143));"
    running += "print('up', flush=True); time.sleep(60)"
    child = running if moment == "while it runs" else "print('up', flush=True); raise SystemExit(1)"
    script = f"from components.supervise import supervise; supervise([{sys.executable!r}, '-c', "
    script += f"{child!r}], pause=60)"
    supervisor = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert supervisor.stdout
    assert supervisor.stdout.readline() == "up\n"
    if moment == "between two starts":
        assert "exit code 1; starting again" in supervisor.stdout.readline()
    begin = time.monotonic()
    supervisor.terminate()
    rest, _ = supervisor.communicate(timeout=30)
    assert time.monotonic() - begin < 30
    assert supervisor.returncode == (143 if moment == "while it runs" else 1)
    assert "up" not in rest, "started again after SIGTERM"
