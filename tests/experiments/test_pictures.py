"""Every picture of the docs is drawn by a script of the project, which runs as documented."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_bundles import small_bundle

from reptile import stages
from reptile.data.dataset import IMAGES_FILE, INDEX_FILE, PreparedData
from reptile.data.readers import sinusoid
from reptile.settings import load_settings

ROOT = Path(__file__).parents[2]
SMALL_SINUSOIDS = (
    "prepare.images_per_class=20",
    "train.train_shots=20",
    "train.meta_iterations=40",
    "train.checkpoint_every=40",
    "train.validation_tasks=4",
    "evaluate.tasks=4",
    "evaluate.queries=10",
    "export.gate.mean_squared_error=1000",
    "export.gate.above_random=-1",
    "export.gate.insist=true",
)
DOCUMENTS = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")))


def table() -> dict[str, str]:
    """The pictures in experiments/README.md, and the command that draws each."""
    text = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `docs/images/(\S+)` \| `(python -m [\w.]+).*?` \|", text, re.M))


def call(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def check_picture(done: subprocess.CompletedProcess[str], path: Path) -> None:
    """It was drawn: a PNG of a size to be read, and more than a frame and a background."""
    assert done.returncode == 0, done.stderr
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert 400 <= image.width <= 2000
        assert 200 <= image.height <= 3000
        pixels = np.asarray(image.convert("L"))
    inked = np.abs(pixels.astype(int) - int(np.median(pixels))) > 40
    assert inked.mean() > 0.003
    halves = [np.array_split(part, 2, axis=1) for part in np.array_split(inked, 2)]
    assert all(part.any() for row in halves for part in row), "something in every quarter"


def test_every_picture_of_the_docs_exists_and_has_its_script() -> None:
    shown = {
        match
        for document in DOCUMENTS
        for match in re.findall(
            r"!\[[^\]]*\]\((?:docs/)?images/([^)]+)\)", (ROOT / document).read_text("utf-8")
        )
    }
    assert shown == {path.name for path in (ROOT / "docs/images").iterdir()}
    assert shown == table().keys()
    for command in table().values():
        module = command.split()[2].replace(".", "/")
        assert (ROOT / f"{module}.py").is_file() or (ROOT / module / "__main__.py").is_file()


def test_every_study_and_picture_script_explains_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    listed = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    for name in names:
        assert f"experiments.{name}" in listed
        monkeypatch.setattr("sys.argv", [name, "--help"])
        monkeypatch.delitem(sys.modules, f"experiments.{name}", raising=False)
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
        assert not stop.value.code
        assert "Usage:" in capsys.readouterr().out


def write_prepared(data: PreparedData, folder: Path) -> None:
    folder.mkdir(parents=True)
    np.save(folder / IMAGES_FILE, data.images)
    (folder / INDEX_FILE).write_text(data.index.model_dump_json(), encoding="utf-8")


def test_few_shot_is_drawn_from_the_artifacts(
    exported: Path, data: PreparedData, tmp_path: Path
) -> None:
    write_prepared(data, tmp_path / "prepared")
    shutil.copytree(exported, tmp_path / "bundle")
    picture = tmp_path / "picture.png"
    words = ("--artifacts", tmp_path, "--output", picture)
    check_picture(call("experiments.few_shot_picture", *words), picture)


def test_sinusoids_are_drawn_from_the_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = Path(stages.__file__).parent / "experiments/presets/sinusoid.yaml"
    settings = load_settings(preset, SMALL_SINUSOIDS)
    monkeypatch.setattr(sinusoid, "SINUSOIDS", 100)
    prepared, checkpoint, evaluation = (tmp_path / n for n in ("prepared", "start", "evaluation"))
    stages.prepare(settings.prepare, prepared)
    stages.train(
        settings.train, prepared, checkpoint, curves=tmp_path / "curves", work=tmp_path / "work"
    )
    stages.evaluate(settings.evaluate, prepared, checkpoint, evaluation)
    stages.export(settings.export, prepared, checkpoint, evaluation, tmp_path / "bundle")
    picture = tmp_path / "picture.png"
    words = ("--artifacts", tmp_path, "--output", picture)
    check_picture(call("experiments.sinusoids_picture", *words), picture)


def test_learning_curves_are_drawn_from_a_reproductions_result(tmp_path: Path) -> None:
    curves = [[(100, 0.4), (200, 0.6), (300, 0.7)], [(100, 0.5), (200, 0.55), (300, 0.8)]]
    seeds = [{"curve": [{"iteration": i, "score": s} for i, s in curve]} for curve in curves]
    (tmp_path / "result.json").write_text(json.dumps({"seeds": seeds}), encoding="utf-8")
    picture = tmp_path / "picture.png"
    words = (tmp_path / "result.json", "--output", picture)
    check_picture(call("experiments.learning_curve_picture", *words), picture)


def test_missing_artifacts_are_one_sentence_with_the_way_out(tmp_path: Path) -> None:
    for name in ("few_shot_picture", "sinusoids_picture"):
        done = call(f"experiments.{name}", "--artifacts", tmp_path, "--output", tmp_path / "p.png")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "reptile prepare" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "p.png").exists()


@pytest.mark.browser
@pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("chromium-browser")),
    reason="Chromium is not installed (Debian: apt install chromium)",
)
def test_the_page_is_drawn_from_a_bundle(exported: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    check_picture(call("experiments.page_picture", exported, "--output", picture), picture)
    values = small_bundle(tmp_path / "bundle", 1, 1)
    check_picture(call("experiments.page_picture", values, "--output", picture), picture)
