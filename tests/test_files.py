import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from full_disk import full_disk

from reptile.errors import InputError
from reptile.files import atomic_directory, atomic_file, lock_folder, write_json, writing


@contextmanager
def another_process(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a program that prints a line when it is as far as it is to go."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


HALF_WRITTEN = """
import sys, time
from pathlib import Path
from reptile.files import atomic_directory
with atomic_directory(Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    print("ready", flush=True)
    time.sleep(100)
"""
LOCKED = """
import sys, time
from pathlib import Path
from reptile.files import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(100)
"""


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with atomic_directory(folder) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_directory(folder) as temporary:
        (temporary / "a").write_text("new")
        raise ZeroDivisionError
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for name in ("old", "new"):
        with atomic_directory(folder) as temporary:
            (temporary / name).touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_with_the_place_and_leaves_what_was_there(tmp_path: Path) -> None:
    folder, path = tmp_path / "out", tmp_path / "file"
    for text in ("small", "x" * 100_000):
        for _ in range(2):
            with full_disk():
                if text == "small":
                    path.write_text(text)
                    with atomic_directory(folder) as temporary:
                        (temporary / "a").write_text(text)
                    continue
                with (
                    pytest.raises(InputError, match=r"out: cannot be written \(.+\)$") as caught,
                    atomic_directory(folder) as temporary,
                ):
                    (temporary / "a").write_text(text)
                assert str(folder) in str(caught.value)
                with (
                    pytest.raises(InputError, match=r"file: cannot be written \(.+\)$"),
                    atomic_file(path) as temporary,
                ):
                    temporary.write_text(text)
    assert path.read_text() == (folder / "a").read_text() == "small"
    assert sorted(tmp_path.iterdir()) == [path, folder]


def test_errors_of_other_files_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), writing(tmp_path / "out"):
        (tmp_path / "elsewhere").read_bytes()


def test_a_place_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="file: is a file, and a folder is to be written"),
        atomic_directory(tmp_path / "file"),
    ):
        pass
    with pytest.raises(OSError, match="file") as caught, atomic_file(tmp_path / "file/inner"):
        pass
    assert str(tmp_path / "file") in str(caught.value)
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(InputError, match=r"folder: cannot be written \(.*directory"),
        atomic_file(tmp_path / "folder") as temporary,
    ):
        temporary.touch()


@pytest.mark.skipif(sys.platform != "linux" or not Path("/sys/kernel").is_dir(), reason="no /sys")
def test_a_read_only_place_is_named_once_and_as_it_was_given() -> None:
    with (
        pytest.raises(InputError, match=r"^/sys/kernel/out: cannot be written \([^/]+\)$"),
        atomic_directory(Path("/sys/kernel/out")),
    ):
        pass


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "large disk/prepared")  # where nothing is yet
    for name in ("first", "second"):
        with atomic_directory(link) as temporary:
            assert temporary.parent == tmp_path / "large disk"
            (temporary / name).touch()
        assert link.is_symlink()
        assert [path.name for path in link.iterdir()] == [name]
    assert [path.name for path in (tmp_path / "large disk").iterdir()] == ["prepared"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_file_that_a_folder_is_too_full_for_is_named_by_the_folder(tmp_path: Path) -> None:
    """The temporary folder, in which it was, is gone when the error is read."""
    out = tmp_path / "out"
    with (
        pytest.raises(InputError) as caught,
        atomic_directory(out) as folder,
        atomic_directory(folder / "inner") as inner,
        atomic_file(inner / "a.json") as file,
    ):
        file.symlink_to("/dev/full")
        file.write_text("more than there is room for")
    assert str(caught.value) == f"{out}: cannot be written (No space left on device)"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["circle", "to circle", "circle/below"])
def test_links_in_a_circle_are_one_sentence(tmp_path: Path, output: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "to circle").symlink_to("circle")
    with (
        pytest.raises(InputError, match=f"{output}: cannot be written .*symbolic links"),
        atomic_directory(tmp_path / output),
    ):
        pass


def test_a_link_to_a_file_is_replaced_and_the_file_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("of others")
    (tmp_path / "out").symlink_to(tmp_path / "cache")
    with atomic_file(tmp_path / "out") as temporary:
        temporary.write_text("new")
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "cache").read_text() == "of others"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_who_may_read_an_output_is_the_umasks_to_say(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "out"):
            pass
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == mode & 0o666


def test_a_killed_process_leaves_nothing_for_good(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with atomic_directory(folder) as temporary:
        (temporary / "whole").touch()
    with another_process(HALF_WRITTEN, folder) as process:
        process.kill()
        process.wait()
    assert len(list(tmp_path.iterdir())) == 2
    assert [path.name for path in folder.iterdir()] == ["whole"]
    with atomic_directory(folder):
        assert len(list(tmp_path.iterdir())) == 2  # the old one, and this process's own
    assert list(tmp_path.iterdir()) == [folder]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with another_process(HALF_WRITTEN, tmp_path / "out"):
        with atomic_directory(tmp_path / "out"):
            pass
        (half,) = tmp_path.glob(".out.*.tmp")
        assert (half / "half").exists()


def test_a_process_that_was_killed_between_two_moves_loses_nothing(tmp_path: Path) -> None:
    number = "0" * 32
    for suffix, name in (("old", "was there"), ("tmp", "whole, but not yet in its place")):
        (tmp_path / f".out.{number}.{suffix}").mkdir()
        (tmp_path / f".out.{number}.{suffix}" / name).touch()
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out"):
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["was there"]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_names_like_those_of_leftovers_are_others(tmp_path: Path) -> None:
    for name in (".out.tmp", ".out.mine.tmp", f".outer.{'0' * 32}.tmp", f"out.{'0' * 32}.tmp"):
        (tmp_path / name).mkdir()
    before = set(tmp_path.iterdir())
    with atomic_directory(tmp_path / "out"):
        pass
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out"}


def test_a_locked_folder_is_refused_to_other_processes(tmp_path: Path) -> None:
    with another_process(LOCKED, tmp_path / "runs") as process:
        with (
            pytest.raises(InputError, match=rf"runs: in use by another process \({process.pid}\)"),
            lock_folder(tmp_path / "runs"),
        ):
            pass
        with lock_folder(tmp_path / "other"):
            pass


def test_a_lock_ends_with_its_block_or_its_process_however_that_dies(tmp_path: Path) -> None:
    with another_process(LOCKED, tmp_path) as process:
        process.kill()
        process.wait()
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path):
        raise ZeroDivisionError
    with lock_folder(tmp_path), pytest.raises(InputError, match="in use"), lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        pass


def test_a_lock_leaves_the_same_bytes_behind_whichever_process_held_it(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    assert (tmp_path / ".lock").read_bytes() == b""


def test_two_processes_never_hold_one_lock_at_once(tmp_path: Path) -> None:
    program = """
import os, sys, time
from pathlib import Path
from reptile.errors import InputError
from reptile.files import lock_folder
root, got = Path(sys.argv[1]), 0
print("ready", flush=True)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        with lock_folder(root / "runs"):
            mark = root / "mark"
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            mark.unlink()
            got += 1
    except InputError:
        pass
print(got)
"""
    with (
        another_process(program, tmp_path) as one,
        another_process(program, tmp_path) as two,
    ):
        assert int(one.communicate()[0]) > 0
        assert int(two.communicate()[0]) > 0
        assert one.returncode == two.returncode == 0


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"accuracy": float("nan")})
    assert not (tmp_path / "x.json").exists()
