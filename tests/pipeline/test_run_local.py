"""The compiled pipeline as it runs on one machine, from a clone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

from components.artifacts import prepare
from components.fetch import content_md5
from pipeline.local import Outcome, examine
from pipeline.revisions import CODE
from reptile.provenance import settings_sha256
from reptile.runtime import FewShotModel
from reptile.settings import load_settings

STAGES = ("prepare", "train", "evaluate", "export", "verify")
POINT = ("--point", "2-way 1-shot frozen")
Ended = tuple[int, str, Path]


class Pipeline(Protocol):
    output: Path
    work: Path

    def start(self, *options: str) -> subprocess.Popen[str]: ...
    def __call__(self, *options: str) -> Ended: ...


def left_by(folder: Path, task: str) -> dict[str, Any]:
    """The metadata of what a task has left, by the artifacts' names; and its values."""
    output = json.loads((folder / task / "executor_output.json").read_text())
    artifacts = {
        name: artifact["artifacts"][0]["metadata"]
        for name, artifact in output.get("artifacts", {}).items()
    }
    return artifacts | output.get("parameterValues", {})


class Folder:
    """An artifact as KFP has it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.metadata: dict[str, Any] = {}


def git(folder: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=folder, text=True).strip()


def test_all_stages_run_and_leave_a_bundle_that_works(delivered: Ended) -> None:
    code, printed, folder = delivered
    assert code == 0, printed
    assert f"delivered: {folder}" in printed
    for stage in (*STAGES, "gate"):
        assert stage in printed
    FewShotModel.load(folder / "export/bundle").check()
    for bundle in (folder / "export/bundles").iterdir():
        assert FewShotModel.load(bundle).manifest["name"].endswith(f"-{bundle.name}")
    assert (
        left_by(folder, "verify")["Output"]
        == left_by(folder, "export")["bundle"]["manifest_sha256"]
    )


def test_every_artifact_says_what_it_was_made_of(delivered: Ended, clone: Path) -> None:
    _, _, folder = delivered
    settings = load_settings(clone / "params.yaml")
    lineage = {
        "data_md5": yaml.safe_load((clone / "data.dvc").read_text())["outs"][0]["md5"],
        "data_revision": git(clone, "log", "-1", "--format=%H", "--", "data.dvc"),
        "git_commit": git(clone, "log", "-1", "--format=%H", "--", *CODE),
    }
    assert git(clone, "rev-parse", "HEAD") == lineage["data_revision"]
    assert lineage["git_commit"] != lineage["data_revision"], "the data's commit left code alone"
    for number, stage in enumerate(STAGES):
        for before in STAGES[: number + 1]:
            section = getattr(settings, before).model_dump(mode="json")
            lineage[f"{before}_settings_sha256"] = settings_sha256(section)
        artifacts = {k: v for k, v in left_by(folder, stage).items() if isinstance(v, dict)}
        scores = artifacts.pop("scores", None)
        assert (scores is None) == (stage != "evaluate")
        assert artifacts
        for name, metadata in artifacts.items():
            assert lineage.items() <= metadata.items(), f"{stage}: {name}"
    verdict = (folder / "gate/verdict").read_text()
    assert lineage["data_revision"] in verdict
    assert lineage["git_commit"] in verdict


def test_the_commit_is_that_of_the_image_unless_it_is_given(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(clone / "params.yaml").prepare.model_dump_json()
    md5 = yaml.safe_load((clone / "data.dvc").read_text())["outs"][0]["md5"]
    monkeypatch.setenv("REPTILE_GIT_COMMIT", "of-the-image")
    for given, expected in {"": "of-the-image", "given": "given"}.items():
        prepared = Folder(tmp_path / expected)
        prepare(settings, str(clone), "", "data", md5, given, prepared)
        assert prepared.metadata["git_commit"] == expected


def test_scores_and_confusions_are_shown_as_they_were_measured(delivered: Ended) -> None:
    _, _, folder = delivered
    found = left_by(folder, "evaluate")
    evaluation = folder / "evaluate/evaluation"
    metrics = json.loads((evaluation / "metrics.json").read_text())
    score = metrics["scores"]["letters"]["2"]["trained"]["frozen"]["interval"]
    assert found["evaluation"]["letters/2-shot/trained/frozen/interval"] == score
    trained = metrics["scores"]["letters"]["2"]["trained"]["frozen"]["mean"]
    shown = f"{100 * trained:.1f} ± {100 * score:.1f}"
    assert found["scores"]["letters, 5-way 2-shot, frozen"] == shown
    assert "data_md5" not in found["scores"], "nothing but scores"
    lines = (evaluation / "confusion.csv").read_text().splitlines()[1:]
    matrix = found["confusion_matrix"]["confusionMatrix"]
    assert found["confusion_matrix"]["display_name"] == "letters, 5-way 1-shot, frozen"
    names = [spec["displayName"] for spec in matrix["annotationSpecs"]]
    rows = [row["row"] for row in matrix["rows"]]
    assert sum(map(sum, rows)) == len(lines)
    for actual, row in zip(names, rows, strict=True):
        for predicted, count in zip(names, row, strict=True):
            assert count == lines.count(f"{actual},{predicted}")
    assert (folder / "evaluate/report").read_bytes() == (evaluation / "report.html").read_bytes()


def test_points_are_measured_and_collected(delivered: Ended) -> None:
    _, printed, folder = delivered
    title, _, how, _, _, _, *lines = (folder / "evaluate/other_tasks").read_text().splitlines()
    assert title == "## Accuracy on other tasks of letters, %"
    assert "95 % interval" in how
    easier, same = (line.split("|")[1:] for line in lines)
    assert easier[0].strip() == "2-way 1-shot frozen"
    assert same[0].strip() == "5-way 2-shot frozen"
    metrics = json.loads((folder / "evaluate/evaluation/metrics.json").read_text())
    methods = metrics["scores"]["letters"]["2"]
    score = methods["trained"]["frozen"]
    expected = f"{100 * score['mean']:.1f} ± {100 * score['interval']:.1f}"
    assert same[1].strip() == expected, "the same tasks as the whole evaluation's"
    assert easier[1].strip() in printed


def test_the_bundle_is_pushed_and_its_pointer_given(delivered: Ended) -> None:
    _, _, folder = delivered
    (out,) = yaml.safe_load((folder / "publish/pointer").read_text())["outs"]
    assert out["md5"] == content_md5(folder / "export/bundle")
    remote = folder.parent.parent / "remote/files/md5"
    assert (remote / out["md5"][:2] / out["md5"][2:]).is_file()
    assert left_by(folder, "publish")["pointer"]["remote"] == str(folder.parent.parent / "remote")


@pytest.mark.slow
def test_the_gate_refuses_and_then_nothing_is_exported(pipeline: Pipeline) -> None:
    code, printed, folder = pipeline(*POINT, "-S", "export.gate.accuracy=0.999")
    assert code == 3, printed
    assert "below the gate of 0.999" in printed.splitlines()[-1]
    assert not (folder / "export").exists()
    assert not (folder / "verify").exists()
    verdict = (folder / "gate/verdict").read_text()
    assert verdict.startswith("## Refused by the gate\n\n")
    assert "below the gate" in verdict
    assert "the report's headline | 5-way 1-shot, frozen |" in verdict, "both scores, named"
    assert f"refused by the gate: {printed.splitlines()[-1]}" in printed, (
        "the end of the task's log"
    )


def spoil_with(changes: dict[str, float]) -> Callable[[str], str]:
    def spoil(text: str) -> str:
        manifest = json.loads(text)
        metrics = manifest["metrics"]
        for score in metrics["scores"]["letters"]["1"][metrics["learner"]].values():
            score |= changes
        return json.dumps(manifest)

    return spoil


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (str, 0),  # as good as the champion, which it is itself
        (spoil_with({"mean": 1.0, "interval": 0.0}), 3),
        (lambda text: text.replace("letters", "numerals"), 1),
    ],
    ids=["equal", "better champion", "champion of other data"],
)
def test_a_champion_decides(
    delivered: Ended, pipeline: Pipeline, tmp_path: Path, spoil: Callable[[str], str], code: int
) -> None:
    manifest = delivered[2] / "export/bundle/manifest.json"
    champion = tmp_path / "champion.json"
    champion.write_text(spoil(manifest.read_text()))
    found, printed, folder = pipeline(*POINT, "--champion", str(champion))
    assert found == code, printed
    assert (folder / "export").exists() == (code == 0)


@pytest.mark.slow
def test_dvc_repro_gives_the_same_bytes(delivered: Ended, clone: Path, tmp_path: Path) -> None:
    _, _, folder = delivered
    copy = tmp_path / "clone"
    shutil.copytree(clone, copy)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["dvc", "repro", "--pull"],
        cwd=copy,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pairs = {
        "train/checkpoint": "checkpoint",
        "train-beside/beside": "beside/checkpoint",
        "prepare/prepared": "prepared",
        "evaluate/evaluation": "evaluation",
        "export/bundle": "bundle",
        "export/bundles": "bundles",
    }
    for ours, theirs in pairs.items():
        expected = {
            p.relative_to(copy / "artifacts" / theirs): p.read_bytes()
            for p in (copy / "artifacts" / theirs).rglob("*")
            if p.is_file()
        }
        found = {
            p.relative_to(folder / ours): p.read_bytes()
            for p in (folder / ours).rglob("*")
            if p.is_file()
        }
        assert found.keys() == expected.keys() != set()
        for name in expected:
            assert found[name] == expected[name], f"{ours}/{name}"


def training_process(work: Path) -> int:
    """The process that trains for a run with this folder of work, below its task's own process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            arguments = path.read_bytes().split(b"\0")
            if {b"components.training", str(work).encode()} <= set(arguments):
                found.append(int(path.parent.name))
    (process,) = found
    return process


@pytest.mark.slow
def test_training_that_is_killed_goes_on_in_the_same_task_or_in_the_next_run(
    pipeline: Pipeline,
) -> None:
    longer = (*POINT, "-S", "train.meta_iterations=400", "-S", "train.checkpoint_every=20")

    def started_and_past(iteration: int) -> subprocess.Popen[str]:
        process = pipeline.start(*longer)
        deadline = time.monotonic() + 300
        while not any(
            int(path.name[-8:]) > iteration for path in pipeline.work.glob("*/iteration-*")
        ):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    process = started_and_past(0)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    killed = max(pipeline.output.iterdir())
    assert not (killed / "train/checkpoint").exists(), "killed too late to show anything"
    reached = max(int(path.name[-8:]) for path in pipeline.work.glob("*/iteration-*"))

    process = started_and_past(reached)
    os.kill(training_process(pipeline.work), signal.SIGKILL)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    start = re.search(r"from meta-iteration (\d+) of 400", printed)
    assert start
    assert int(start[1]) == reached + 1
    assert "killed by SIGKILL" in printed
    assert "(restart 1 of 3)" in printed
    assert not list(pipeline.work.iterdir()), "a finished run leaves no work behind"
    resumed = max(pipeline.output.iterdir())

    code, printed, whole = pipeline(*longer)
    assert code == 0, printed
    assert "from meta-iteration 1 of 400" in printed
    for name in ("weights.safetensors", "checkpoint.json"):
        ours = (resumed / "train/checkpoint" / name).read_bytes()
        assert ours == (whole / "train/checkpoint" / name).read_bytes()


def test_a_run_is_judged_by_what_it_left_not_by_its_status(
    delivered: Ended, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(delivered[2], copy)
    assert examine(copy, publishes=True).outcome is Outcome.DELIVERED
    for path, content in {
        "verify/verification": '{"checks": []}',
        "export/bundle/MODEL_CARD.md": "better",
        "publish/pointer": "outs: [{md5: 0}]",
        "evaluate/other_tasks": None,
    }.items():
        before = (copy / path).read_bytes()
        (copy / path).unlink() if content is None else (copy / path).write_text(content)
        run = examine(copy, publishes=True)
        assert run.outcome is Outcome.FAILED, path
        assert run.message
        (copy / path).write_bytes(before)
    assert examine(copy, "Docker says so").outcome is Outcome.FAILED
    for stage in ("train", "evaluate", "gate", "export", "verify"):
        shutil.rmtree(copy / stage)
    run = examine(copy, "the task check failed")
    assert run.outcome is Outcome.FAILED
    assert run.message == "the task check failed", "what was not started is no problem of its own"
    assert examine(copy).message.count("\n") == 4
