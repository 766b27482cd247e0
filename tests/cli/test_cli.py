"""The command line as a person meets it: the whole pipeline, and one line for each mistake."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from full_disk import full_disk
from PIL import Image
from safetensors.numpy import load_file, save_file

from reptile import cli
from reptile.files import lock_folder

Run = Callable[..., tuple[int, str, str]]


def test_the_stages_make_what_the_design_names(finished: Path) -> None:
    artifacts = finished / "artifacts"
    for name in (
        "prepared/images.npy",
        "prepared/dataset.json",
        "checkpoint/weights.safetensors",
        "checkpoint/checkpoint.json",
        "evaluation/metrics.json",
        "evaluation/report.html",
        "bundle/manifest.json",
        "bundle/adapt/1/model.onnx",
        "bundle/MODEL_CARD.md",
        "curves/plots/metrics/validation_accuracy.tsv",
    ):
        assert (artifacts / name).is_file(), name
    report = json.loads((artifacts / "verification.json").read_text())
    assert report["checks"]
    assert all(check["passed"] for check in report["checks"])
    assert not list((artifacts / "training").iterdir()), "a finished run leaves no work behind"


def test_show_prints_accuracies_and_places(here: Path, run: Run) -> None:
    code, out, _ = run("show")
    assert code == 0
    assert "letters" in out
    assert "digits" in out
    assert "artifacts/bundle" in out
    assert "report.html" in out


def test_running_again_gives_the_same_bytes(finished: Path, here: Path, run: Run) -> None:
    for stage in ("prepare", "train", "evaluate", "export"):
        assert run(stage)[0] == 0
    files = [path for path in (here / "artifacts").rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        before = finished / path.relative_to(here)
        assert before.read_bytes() == path.read_bytes(), path.relative_to(here)


def test_the_gate_refuses_and_can_be_overruled(here: Path, run: Run) -> None:
    before = (here / "artifacts/bundle/manifest.json").read_bytes()
    code, _, err = run("export", "-S", "export.gate.accuracy=1.0")
    assert code == 3
    assert "below the gate of 1.0" in err
    code, _, err = run("export", "-S", "export.gate.above_random=1.0")
    assert code == 3
    assert "above the random" in err
    assert (here / "artifacts/bundle/manifest.json").read_bytes() == before
    assert run("export", "-S", "export.gate.accuracy=1.0", "--ignore-gate")[0] == 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def change_weights(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = folder / "artifacts/checkpoint/weights.safetensors"
    tensors = load_file(path)
    save_file({n: each if n == "step" else change(each) for n, each in tensors.items()}, path)


def emptied(folder: Path) -> None:
    (folder.parent / "bundles/.DS_Store").touch()
    shutil.rmtree(folder)
    folder.mkdir()


def change_info(folder: Path, **changes: object) -> None:
    """Change what checkpoint.json says; None leaves it out."""
    path = folder / "artifacts/checkpoint/checkpoint.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: each for name, each in values.items() if each is not None}))


MISTAKES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "no params": (lambda p: (p / "params.yaml").unlink(), ["prepare"], ["params.yaml", "--params"]),
    "unknown setting": (lambda p: None, ["train", "-S", "train.shots=3"], ["train.shots"]),
    "value out of range": (lambda p: None, ["train", "-S", "train.ways=1"], ["train.ways", "1"]),
    "no such source": (
        lambda p: None,
        ["prepare", "-S", "prepare.source=nowhere.zip"],
        ["nowhere.zip", "no such source"],
    ),
    "unreadable image": (
        lambda p: truncate(p / "letters/group0/class0/0.png"),
        ["prepare", "-S", "prepare.source=letters"],
        ["group0/class0/0.png"],
    ),
    "empty class": (
        lambda p: (p / "letters/group1/empty").mkdir(),
        ["prepare", "-S", "prepare.source=letters"],
        ["group1/empty"],
    ),
    "too few images": (
        lambda p: None,
        ["prepare", "-S", "prepare.images_per_class=7"],
        ["has 6", "7"],
    ),
    "mixed channels": (
        lambda p: Image.new("RGB", (14, 14)).save(p / "letters/group0/class0/0.png"),
        ["prepare", "-S", "prepare.source=letters"],
        ["grey", "in colour", "channels"],
    ),
    "more ways than classes": (
        lambda p: None,
        ["train", "-S", "train.ways=300"],
        ["300-way", "classes"],
    ),
    "more shots than images": (
        lambda p: None,
        ["train", "-S", "train.train_shots=7"],
        ["6 images", "7"],
    ),
    "not prepared": (
        lambda p: shutil.rmtree(p / "artifacts/prepared"),
        ["train"],
        ["reptile prepare"],
    ),
    "damaged prepared data": (
        lambda p: truncate(p / "artifacts/prepared/images.npy"),
        ["train"],
        ["reptile prepare"],
    ),
    "not trained": (
        lambda p: shutil.rmtree(p / "artifacts/checkpoint"),
        ["evaluate"],
        ["reptile train"],
    ),
    "damaged checkpoint": (
        lambda p: truncate(p / "artifacts/checkpoint/weights.safetensors"),
        ["evaluate"],
        ["damaged checkpoint"],
    ),
    "weights that are not finite": (
        lambda p: change_weights(p, lambda values: values * np.float32(np.nan)),
        ["evaluate"],
        ["weights.safetensors: damaged checkpoint (its numbers are not finite float32)"],
    ),
    "weights of another type": (
        lambda p: change_weights(p, lambda values: values.astype(np.float64)),
        ["evaluate"],
        ["weights.safetensors: damaged checkpoint (its numbers are not finite float32)"],
    ),
    "checkpoint of a later version": (
        lambda p: change_info(p, format=99, future=True),
        ["evaluate"],
        ["checkpoint.json: is of format 99", "install the version"],
    ),
    "checkpoint without its iteration": (
        lambda p: change_info(p, iteration=None),
        ["evaluate"],
        ["checkpoint.json: iteration: Field required\n"],
    ),
    "other data than trained on": (
        lambda p: cli_prepare_other_splits(p),
        ["evaluate"],
        ["trained on letters", "reptile train"],
    ),
    "not evaluated": (
        lambda p: shutil.rmtree(p / "artifacts/evaluation"),
        ["export"],
        ["reptile evaluate"],
    ),
    "trained again since the evaluation": (
        lambda p: change_weights(p, lambda values: values * np.float32(1.5)),
        ["export", "--ignore-gate"],
        ["evaluation: measured another checkpoint than", "run `reptile evaluate` again"],
    ),
    "gate on what was not evaluated": (
        lambda p: None,
        ["export", "-S", "export.gate.shots=9"],
        ["9-shot", "evaluate.shots"],
    ),
    "changed bundle": (
        lambda p: (p / "artifacts/bundle/MODEL_CARD.md").write_text("better"),
        ["verify"],
        ["failed"],
    ),
    "no bundles": (
        lambda p: shutil.rmtree(p / "artifacts/bundles"),
        ["verify"],
        ["artifacts/bundles: no bundle of the first learner", "run `reptile export`"],
    ),
    "an empty folder of bundles": (
        lambda p: emptied(p / "artifacts/bundles"),
        ["verify"],
        ["artifacts/bundles: no bundle of the first learner", "run `reptile export`"],
    ),
    "no bundle": (
        lambda p: emptied(p / "artifacts/bundle"),
        ["verify"],
        ["artifacts/bundle: no manifest", "run `reptile export`"],
    ),
    "output where a file is": (
        lambda p: (p / "plain").write_text(""),
        ["prepare", "--artifacts", "plain/below"],
        ["plain"],
    ),
}


def cli_prepare_other_splits(folder: Path) -> None:
    path = folder / "params.yaml"
    changed = path.read_text().replace("image_size: 14", "image_size: 14, split_seed: 5")
    path.write_text(changed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sys.argv", ["reptile", "prepare"])
        with pytest.raises(SystemExit):
            cli.run()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_error_and_loses_nothing(mistake: str, here: Path, run: Run) -> None:
    spoil, arguments, words = MISTAKES[mistake]
    spoil(here)
    before = set(here.rglob("*"))
    code, _, err = run(*arguments)
    assert code == (5 if mistake == "changed bundle" else 2), err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err
    left_behind = set(here.rglob("*")) - before
    allowed = {here / "artifacts/curves", here / "artifacts/verification.json"}
    assert not {path for path in left_behind if not allowed & {path, *path.parents}}


def test_usage_errors_and_help_need_no_params(here: Path, run: Run) -> None:
    assert run("trian")[0] == 2
    assert run("train", "--sed", "1")[0] == 2
    for command in ("prepare", "train", "evaluate", "export", "verify"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"reptile {command}" in out, "the help has an example"


def test_the_readmes_consumer_script_runs_as_it_stands(here: Path, root: Path) -> None:
    script = (root / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(script.splitlines()) <= 15
    images = np.load(here / "artifacts/prepared/images.npy")[:, 0]
    np.savez(here / "letters.npz", support=images[:30:6], queries=images[1:30:6])
    # As a consumer has it: a process of its own, in which none of the training packages is loaded.
    unwanted = "torch", "onnx", "pydantic", "PIL", "sklearn", "typer"
    watched = f"{script}\nimport sys\nassert not set(sys.modules) & {set(unwanted)}\n"
    done = subprocess.run(
        [sys.executable, "-c", watched], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    assert names <= {"alef", "bet", "gimel", "dalet", "he"}
    assert (here / "hebrew.task").is_file()


def test_unfinished_runs_are_listed_and_those_that_do_not_fit_removed(here: Path, run: Run) -> None:
    code, out, _ = run("runs")
    assert (code, out) == (0, "no unfinished runs in artifacts/training\n")
    checkpoint = here / "artifacts/training" / ("a" * 16) / "iteration-00000003"
    shutil.copytree(here / "artifacts/checkpoint", checkpoint)

    code, out, _ = run("runs")
    assert code == 0
    assert "meta-iteration 3" in out
    assert out.endswith("; resumed\n")
    code, out, _ = run("runs", "--remove", "-S", "train.seed=7")
    assert code == 0
    assert "removed: other settings (seed: 0, now 7)" in out
    assert not checkpoint.parent.exists()
    assert (here / "artifacts/checkpoint").is_dir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("evaluate.shots=[1,19]", "evaluate"),
        ("verify.shots=20", "verify"),
        ("export.gate.shots=7", r"export.gate.shots = 7"),
        ("export.max_steps=1", "export.max_steps = 1"),
        ("export.gate.mean_squared_error=5", "export.gate.mean_squared_error = 5"),
        ("evaluate.ways=6", "6-way tasks: reptile trained with 5 ways is for 2 to 5 ways"),
        ("evaluate.ways=1", "1-way tasks"),
        ("train.algorithm=ridge evaluate.ways=1", "1-way tasks"),
        ("train.algorithm=ridge train.episode.shots=[1] evaluate.learner=ridge", "no such row"),
        ("train.algorithm=pretrain evaluate.learner=prototypes", "no such row for pretrain"),
        ("train.algorithm=ridge train.episode.shots=[1] export.max_support=1001", "max_support"),
        ("evaluate.learner=auto export.max_support=1001", "export.max_support = 1001"),
        ("evaluate.folds=99", "evaluate.folds = 99"),
        ("evaluate.folds=15", "validation split: 2 classes cannot make a 5-way task"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_training(
    change: str, words: str, here: Path, run: Run
) -> None:
    before = (here / "artifacts/checkpoint/checkpoint.json").read_bytes()
    changes = [part for each in change.split() for part in ("-S", each)]
    code, _, err = run("train", *changes, "-S", "train.seed=99")
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1
    assert (here / "artifacts/checkpoint/checkpoint.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("algorithm=ridge ways=300", "classes cannot make a 300-way task"),
        ("algorithm=ridge episode.shots=[9]", "a class has 6 images and a task needs 14"),
        ("algorithm=ridge episode.shots=[1] weights=1", "beside.weights: no such setting"),
        ("algorithm=reptile train_shots=5 ways=4", "5-way tasks: reptile trained with 4 ways"),
        ("algorithm=bayes episode.shots=[1]", "algorithm = bayes: for regression"),
        (
            "algorithm=reptile train_shots=5 model.name=torchvision:nothing",
            "torchvision has no nothing",
        ),
    ],
)
def test_a_second_learner_that_cannot_be_trained_is_said_before_the_first_is(
    change: str, words: str, here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under DVC, which trains it next, it is refused."""
    changes = [part for each in change.split() for part in ("-S", f"beside.{each}")]
    monkeypatch.setenv("DVC_STAGE", "train")
    before = (here / "artifacts/checkpoint/checkpoint.json").read_bytes()
    code, _, err = run("train", *changes, "-S", "train.seed=99")
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith("error: ") and words in err
    assert (here / "artifacts/checkpoint/checkpoint.json").read_bytes() == before


def test_a_second_learner_that_cannot_be_trained_is_a_warning_without_dvc(
    here: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    code, _, err = run("train", "-S", "beside.algorithm=ridge", "-S", "beside.ways=300")
    assert code == 0, err
    assert "warning: the second learner, of `beside`: training split: " in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size")
def test_a_full_disk_ends_training_and_evaluation_with_one_line(here: Path, run: Run) -> None:
    """The results before stay, and training resumes where there is room again."""
    kept = {path: path.read_bytes() for path in (here / "artifacts").rglob("*.json")}
    with full_disk(2048):
        trained = run("train", "-S", "train.seed=5")
        evaluated = run("evaluate", "-S", "evaluate.seed=5")
    for code, _, err in (trained, evaluated):
        assert code == 2
        assert len(err.splitlines()) == 1
        assert "cannot be written (File too large)" in err
        assert ".tmp" not in err
    assert "artifacts/training/" in trained[2]
    assert evaluated[2].startswith("error: artifacts/evaluation: ")
    curves = here / "artifacts/curves"
    assert all(path.read_bytes() == old for path, old in kept.items() if curves not in path.parents)
    assert run("train", "--resume", "-S", "train.seed=5")[0] == 0


def test_a_second_training_in_the_same_folder_is_refused(here: Path, run: Run) -> None:
    with lock_folder(here / "artifacts"):
        code, _, err = run("train")
    assert code == 2
    assert "in use by another process" in err
    assert run("train")[0] == 0


def test_another_checkpoint_is_measured_beside(here: Path, run: Run) -> None:
    code, out, err = run("evaluate", "--beside", "again=artifacts/checkpoint")
    assert code == 0, err
    assert "again, frozen" in out
    metrics = json.loads((here / "artifacts/evaluation/metrics.json").read_text())
    assert metrics["beside"] == ["again"]
    assert {
        score["mean"] for score in metrics["differences"]["letters"]["1"]["again"].values()
    } == {0}
    code, _, err = run("evaluate", "--beside", "artifacts/checkpoint")
    assert code == 2
    assert "write it as NAME=FOLDER" in err


def test_the_gate_asks_simpler_methods_unless_it_is_told_to_insist(here: Path, run: Run) -> None:
    assert "insist: true" in Path("params.yaml").read_text(), "as the bundle was exported"
    code, _, err = run("export", "-S", "export.gate.insist=false")
    assert code == 3
    assert "a simpler method is better on the same tasks" in err
