"""`reptile classify` as a person meets it: pictures in, names out, one line for each mistake."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reptile import cli
from reptile.data.dataset import PreparedData
from reptile.runtime import FewShotModel

NAMES = ["alef", "bet", "gimel"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pictures(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: five examples a class in support/, five more each in new/."""
    monkeypatch.chdir(tmp_path)
    test = data.split("test")
    (tmp_path / "new").mkdir()
    for name, start in zip(NAMES, test.starts, strict=False):
        (tmp_path / "support" / name).mkdir(parents=True)
        for number in range(10):
            folder = f"support/{name}" if number < 5 else "new"
            image = Image.fromarray(data.images[start + number, 0])
            image.save(tmp_path / folder / f"{name}{number}.png")
    return tmp_path


@pytest.fixture
def classify(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run `reptile classify BUNDLE …`; return its exit code and what it wrote."""

    def call(*arguments: object, bundle: Path = exported) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["reptile", "classify", str(bundle), *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as stop:
            cli.run()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


def queries(folder: Path) -> list[Path]:
    return sorted(folder.glob("new/*.png"))


def test_pictures_are_named_right(pictures: Path, classify: Run) -> None:
    code, out, err = classify("--support", "support", "--steps", 60, "--json", *queries(pictures))
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["labels"] == NAMES
    assert len(result["losses"]) == 60
    right = [Path(p["image"]).stem[:-1] == p["label"] for p in result["predictions"]]
    assert len(right) == 15
    assert sum(right) >= 13
    for prediction in result["predictions"]:
        shares = prediction["probabilities"]
        assert max(shares, key=shares.get) == prediction["label"]
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)


def test_the_command_gives_what_the_runtime_gives_on_the_same_pixels(
    pictures: Path, classify: Run, exported: Path, data: PreparedData
) -> None:
    starts = data.split("test").starts[: len(NAMES)]
    support = np.concatenate([data.images[start : start + 5] for start in starts])
    adapted = FewShotModel.load(exported).adapt(support, np.repeat(NAMES, 5), steps=7, seed=3)
    expected = adapted.predict(np.concatenate([data.images[s + 5 : s + 10] for s in starts]))
    options = "--support", "support", "--steps", 7, "--seed", 3, "--json"
    _, out, _ = classify(*options, *queries(pictures))
    found = [list(p["probabilities"].values()) for p in json.loads(out)["predictions"]]
    np.testing.assert_allclose(found, expected.probabilities, rtol=1e-5)


def test_the_table_has_a_line_an_image(pictures: Path, classify: Run) -> None:
    paths = [path.relative_to(pictures) for path in queries(pictures)]
    code, out, _ = classify("--support", "support", *paths)
    assert code == 0
    assert "learnt 3 classes from 15 images in 10 steps, loss" in out
    for path in paths:
        (line,) = [line for line in out.splitlines() if str(path) in line]
        assert "%" in line
        assert "━" in line


def test_what_is_saved_predicts_the_same_without_the_examples(
    pictures: Path, classify: Run
) -> None:
    _, before, _ = classify("--support", "support", "--json", *queries(pictures))
    assert classify("--support", "support", "--save", "letters.task")[0] == 0
    code, after, _ = classify("--task", "letters.task", "--json", *queries(pictures))
    assert code == 0
    assert json.loads(after) == json.loads(before)


def test_pictures_of_any_size_and_colour_are_fitted_as_for_training(
    pictures: Path, classify: Run
) -> None:
    Image.new("L", (12, 12), 255).save("plain.png")
    Image.new("RGB", (48, 30), "white").save("large.jpg")
    Image.new("RGBA", (7, 9), (0, 0, 0, 0)).save("transparent.png")
    code, out, _ = classify(*SUPPORT, "--json", "plain.png", "large.jpg", "transparent.png")
    assert code == 0
    plain, *others = (p["probabilities"] for p in json.loads(out)["predictions"])
    assert others == [pytest.approx(plain, abs=1e-6)] * 2


def test_the_examples_may_be_zipped(pictures: Path, classify: Run) -> None:
    shutil.make_archive("zipped", "zip", root_dir=pictures, base_dir="support")
    _, folder, _ = classify("--support", "support", "--json", "new/bet7.png")
    _, zipped, _ = classify("--support", "zipped.zip", "--json", "new/bet7.png")
    assert json.loads(zipped) == json.loads(folder)


def test_a_folder_called_digits_is_a_folder_and_not_the_dataset(
    pictures: Path, classify: Run
) -> None:
    (pictures / "support").rename(pictures / "digits")
    _, out, _ = classify("--support", "digits", "--json", "new/bet7.png")
    assert json.loads(out)["labels"] == NAMES


def test_a_name_that_would_command_the_terminal_is_quoted(pictures: Path, classify: Run) -> None:
    (pictures / "new/alef5.png").rename(pictures / "new/\x1b[31m[red].png")
    code, out, _ = classify("--support", "support", "new/\x1b[31m[red].png")
    assert code == 0
    assert "\x1b" not in out
    assert "[red].png" in out


def more_classes(folder: Path) -> None:
    for name in ("dalet", "he"):
        (folder / "support" / name).mkdir()
        Image.new("L", (12, 12)).save(folder / "support" / name / "0.png")


def more_images(folder: Path) -> None:
    for number in range(50):
        Image.new("L", (12, 12)).save(folder / "support/alef" / f"more{number}.png")


def one_class(folder: Path) -> None:
    for name in ("bet", "gimel"):
        (folder / "support" / name).rename(folder / name)


SUPPORT = ["--support", "support"]
MISTAKES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "too many classes": (more_classes, SUPPORT, ["classes: 5", "dalet", "2 to 3"]),
    "one class": (one_class, SUPPORT, ["classes: 1 (alef)", "2 to 3"]),
    "too many images": (more_images, SUPPORT, ["65 images", "at most 50"]),
    "empty class": (lambda p: (p / "support/dalet").mkdir(), SUPPORT, ["support", "'dalet'"]),
    "empty folder": (lambda p: (p / "empty").mkdir(), ["--support", "empty"], ["no PNG or JPEG"]),
    "no such folder": (lambda p: None, ["--support", "nowhere"], ["nowhere", "no such"]),
    "example not an image": (
        lambda p: (p / "support/bet/bet0.png").write_text("hello"),
        SUPPORT,
        ["bet0.png", "cannot be read"],
    ),
    "image not an image": (
        lambda p: (p / "new/bet5.png").write_bytes(b"\x89PNG\r\n\x1a\nhello"),
        [*SUPPORT, "new/bet5.png"],
        ["new/bet5.png", "cannot be read"],
    ),
    "no such image": (lambda p: None, [*SUPPORT, "a.png"], ["a.png", "no such file"]),
    "a folder for an image": (lambda p: None, [*SUPPORT, "new"], ["new", "a folder"]),
    "neither examples nor task": (lambda p: None, [], ["--support", "--task"]),
    "both examples and task": (lambda p: None, [*SUPPORT, "--task", "x"], ["--support", "--task"]),
    "steps for a saved task": (lambda p: None, ["--task", "x", "--steps", "5"], ["--steps"]),
    "a task that is none": (
        lambda p: (p / "x.task").write_text("hello, this is not one"),
        ["--task", "x.task"],
        ["x.task"],
    ),
    "too many steps": (lambda p: None, [*SUPPORT, "--steps", "61"], ["steps", "0..60"]),
    "a negative seed": (lambda p: None, [*SUPPORT, "--seed", "-1"], ["seed", "-1"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, pictures: Path, classify: Run) -> None:
    spoil, arguments, words = MISTAKES[mistake]
    spoil(pictures)
    code, out, err = classify(*arguments, "new/alef6.png")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_nothing_to_do_is_said(pictures: Path, classify: Run) -> None:
    code, _, err = classify("--support", "support")
    assert code == 2
    assert "no images to classify" in err


def test_no_bundle_is_said(pictures: Path, classify: Run) -> None:
    code, _, err = classify(*SUPPORT, "new/alef6.png", bundle=pictures / "nowhere")
    assert code == 2
    assert "nowhere is not a folder" in err
    assert err.count("\n") == 1


def test_no_package_of_training_alone_is_loaded(pictures: Path, exported: Path) -> None:
    script = (
        "import sys; from reptile.cli import run\n"
        "try: run()\n"
        "finally: print(*{'torch', 'onnx', 'sklearn', 'safetensors'} & set(sys.modules))"
    )
    command = ["classify", str(exported), *SUPPORT, "new/alef6.png", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_a_stage_without_its_packages_says_what_to_install(root: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"  # importing it fails as if it were not there
        "from reptile.__main__ import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "check-model", "--params", root / "params.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the package torch is missing")
    assert "[train,cpu]" in done.stderr
    assert done.stderr.count("\n") == 1
