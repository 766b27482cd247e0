"""`reptile prepare` as a person runs it: one line for every fault, on any terminal."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published import write_idx_set

ROOT = Path(__file__).parent.parent.parent
PLAIN = ("-S", "prepare.cross_domain=[]", "-S", "prepare.rotations=false")


def run(
    folder: Path, *arguments: str, env: dict[str, str] | None = None, limit: int | None = None
) -> subprocess.CompletedProcess[str]:
    program = "import sys; from reptile.__main__ import main; main()"
    if limit is not None:  # of the size of any file: a disk that is full
        program = (
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {program}"
        )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | (env or {}),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def write_classes(root: Path, names: list[str], images: int = 20) -> Path:
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(images):
            pixels = np.random.default_rng(100 * c + i).integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    return tmp_path


def prepare(place: Path, source: str, *more: str, **options: object) -> tuple[int, str, str]:
    arguments = ("prepare", "-S", f"prepare.source={source}", "-S", "prepare.held_out=classes")
    done = run(place, *arguments, *PLAIN, *more, **options)  # type: ignore[arg-type]
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_cannot_show_a_name_stops_nothing(place: Path, encoding: str) -> None:
    write_classes(place / "鳥", ["猫", "Öl", *"abcdefgh"])
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    code, out, err = prepare(place, "鳥", env=env)
    assert (code, "Traceback" in err) == (0, False), err
    assert ("鳥" if encoding == "utf-8" else r"\u9ce5") in out
    (place / "鳥/猫/x.txt").touch()
    code, out, err = prepare(place, "鳥", env=env)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "猫" in err or r"\u732b" in err


def test_a_full_disk_is_one_line_with_the_place_and_the_data_before_stay(place: Path) -> None:
    write_classes(place / "birds", list("abcdefgh"))
    assert prepare(place, "birds")[0] == 0
    before = (place / "artifacts/prepared/images.npy").read_bytes()
    code, _, err = prepare(place, "birds", "-S", "prepare.image_size=56", limit=50_000)
    assert code == 2
    assert err == "error: artifacts/prepared: cannot be written (File too large)\n"
    assert (place / "artifacts/prepared/images.npy").read_bytes() == before
    assert [path.name for path in (place / "artifacts").iterdir()] == ["prepared"]


def test_sinusoids_on_a_full_disk_are_one_line_too(place: Path) -> None:
    code, _, err = prepare(place, "sinusoid", limit=50_000)
    assert code == 2
    assert err.startswith("error: artifacts/prepared: cannot be written (")
    assert err.count("\n") == 1
    assert list((place / "artifacts").iterdir()) == []


def test_no_room_for_temporary_files_is_one_line_that_says_where(place: Path) -> None:
    labels = {"train": np.arange(800) % 10, "t10k": np.arange(10)}
    write_idx_set(place / "mnist", labels, size=(28, 28))
    (place / "temporary").mkdir()
    here = {"TMPDIR": str(place / "temporary")}
    code, _, err = prepare(place, "mnist", env=here, limit=50_000)
    assert code == 2
    assert err.startswith(f"error: {place / 'temporary'}: cannot be written (")
    assert "set TMPDIR" in err and err.count("\n") == 1


@pytest.mark.parametrize("output", ["file/a", "file"])
def test_a_place_that_cannot_be_written_is_one_line(place: Path, output: str) -> None:
    write_classes(place / "birds", list("abcdefgh"))
    (place / "file").touch()
    code, _, err = prepare(place, "birds", "--artifacts", output)
    assert code == 2
    assert err.startswith(f"error: {place / 'file'}") and err.count("\n") == 1


@pytest.mark.parametrize("side", [8_000, 11_000, 20_000, 2**31 - 1])
def test_an_image_of_too_many_pixels_is_one_line_of_ours(place: Path, side: int) -> None:
    """Beyond limits of its own, Pillow warns or fails, in words about attacks."""
    write_classes(place / "birds", list("abcdefgh"))
    path = place / "birds/a/00.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    content = path.read_bytes()
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    code, _, err = prepare(place, "birds")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: birds/a/00.png: ") and "50,000,000" in err


def test_classes_too_few_for_the_stages_that_follow_are_said_at_once(place: Path) -> None:
    write_classes(place / "birds", [f"bird{n:02}" for n in range(20)])
    code, _, err = prepare(place, "birds", "-S", "prepare.validation=0")
    assert code == 0
    assert err == (
        "warning: test split of birds, for `reptile evaluate`: 4 classes cannot make a 5-way task; "
        "lower the ways or hold out more classes\n"
    )
    code, _, err = prepare(place, "birds", "-S", "prepare.test=5", "-S", "evaluate.queries=19")
    assert code == 0 and "a class has 20 images and a task needs 24 of each" in err


def test_preparing_imports_no_torch(place: Path) -> None:
    """It would take longer than to prepare a small set."""
    write_classes(place / "birds", list("abcdefgh"))
    code, _, err = prepare(place, "birds", env={"PYTHONPROFILEIMPORTTIME": "1"})
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines()}
    assert code == 0
    assert "numpy" in imported
    assert "torch" not in imported
