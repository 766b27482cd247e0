"""Sweeps: which candidates there are, and a small one run to its end by kfp's local runner."""

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kfp
import pytest
from kubeflow_server import KubeflowServer
from safetensors.numpy import load_file

from pipeline import SWEEP
from pipeline import __main__ as command
from pipeline.local import Outcome, examine
from pipeline.sweep import candidates
from reptile import __version__
from reptile.errors import InputError
from reptile.learn.checkpoint import load_checkpoint
from reptile.provenance import settings_sha256
from reptile.runtime import FewShotModel
from reptile.settings import load_settings


@pytest.fixture
def params(root: Path) -> Path:
    return root / "params.yaml"


def test_candidates_are_all_combinations_in_the_order_of_the_values(params: Path) -> None:
    found = candidates(
        params,
        ["train.meta_step=0.5,1.0", "train.model={name: conv4, filters: 8}", "train.seed=3,0"],
    )
    assert [(c.train.meta_step, c.train.seed) for c in found] == [
        (0.5, 3),
        (0.5, 0),
        (1.0, 3),
        (1.0, 0),
    ]
    assert {c.train.model.filters for c in found} == {8}
    others = {c.model_copy(update={"train": found[0].train}) for c in found}
    assert len(others) == 1, "they share everything but training"


def test_a_list_is_one_value_and_the_same_candidate_is_one(params: Path) -> None:
    found = candidates(params, ["evaluate.shots=[1,5]", "train.seed=0,1,0"])
    assert [c.train.seed for c in found] == [0, 1]
    assert found[0].evaluate.shots == (1, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "two candidates or more"),
        (["train.seed=1"], "two candidates or more"),
        (["train.seed=1,1"], "two candidates or more"),
        (["evaluate.steps=5,50", "train.seed=0,1"], "varies settings of `train`"),
        (["train.seed=0,1", "prepare.validation=0"], "chooses by the validation split"),
        (["train.seed=0,-1"], "train.seed"),
        (["train.sed=0,1"], "no such setting"),
        (["train.seed"], "stage.setting=value"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_sentence(
    params: Path, changes: list[str], words: str
) -> None:
    with pytest.raises(InputError) as error:
        candidates(params, changes)
    assert words in str(error.value)


@pytest.fixture(scope="module")
def swept(clone: Path) -> tuple[str, Path]:
    """A sweep of three that ended well: what was printed, and its folder."""
    command = [sys.executable, "-m", "pipeline", "sweep", "--local"]
    done = subprocess.run(
        [*command, "-S", "train.meta_iterations=3,6,9", "-S", "train.checkpoint_every=3"],
        cwd=clone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, max((clone / "artifacts/kubeflow").iterdir())


@pytest.mark.slow
def test_the_best_by_validation_is_evaluated_once_and_delivered(swept: tuple[str, Path]) -> None:
    printed, folder = swept
    assert "3 candidates" in printed
    trained = {
        path: load_checkpoint(path).info for path in folder.glob("for-loop-*/train/checkpoint")
    }
    assert sorted(info.settings.meta_iterations for info in trained.values()) == [3, 6, 9]
    best = max(info.curve[-1].score for info in trained.values())
    chosen = load_checkpoint(folder / "choose/best").info
    assert chosen.curve[-1].score == best
    (source,) = (path for path, info in trained.items() if info == chosen)
    ours, theirs = (
        load_file(path / "weights.safetensors") for path in (source, folder / "choose/best")
    )
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert len(list(folder.glob("**/evaluation/metrics.json"))) == 1, "on the test split, once"
    FewShotModel.load(folder / "export/bundle").check()
    # The learner beside it may be the better one: its bundle is then the one that is delivered.
    manifest = json.loads((folder / "export/bundles/reptile/manifest.json").read_text())
    sha256 = settings_sha256(chosen.settings.model_dump(mode="json"))
    assert manifest["provenance"]["settings_sha256"] == sha256
    run = examine(folder)
    assert run.outcome is Outcome.DELIVERED
    (line,) = (result.found for result in run.results if result.stage == "train")
    assert line.count("\n") == 3, "a row for each candidate, and the best"


def test_the_settings_of_a_candidate_are_those_of_one_run_alone(params: Path) -> None:
    (_, second) = candidates(params, ["train.optimizer.learning_rate=0.001,0.01"])
    assert second == load_settings(params, ["train.optimizer.learning_rate=0.01"])


# By DVC, as docs/pipeline.md has it


@pytest.mark.slow
def test_queued_experiments_are_one_table_and_the_best_alone_is_evaluated(
    clone: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "clone"
    shutil.copytree(clone, copy)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    names = ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL")
    environment = os.environ | {"PATH": programs} | {f"GIT_{name}": "test" for name in names}

    def dvc(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    dvc("exp", "run", "--queue", "train", "-S", "train.meta_iterations=3,6")
    dvc("exp", "run", "--run-all")
    assert not (copy / "artifacts/evaluation").exists(), "the test split was not used"
    sort = ("--sort-by", "validation_accuracy", "--sort-order", "desc")
    text = dvc("exp", "show", "--only-changed", "--csv", *sort)
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["State"] == "Success"]
    assert {row["train.meta_iterations"] for row in rows} == {"3", "6"}
    scores = [float(row["validation_accuracy"]) for row in rows]
    assert scores == sorted(scores, reverse=True)

    best = rows[0]["train.meta_iterations"]
    printed = dvc("exp", "run", "-S", f"train.meta_iterations={best}")
    assert "Stage 'train' is cached - skipping run" in printed
    info = load_checkpoint(copy / "artifacts/checkpoint").info
    assert str(info.settings.meta_iterations) == rows[0]["train.meta_iterations"]
    assert info.curve[-1].score == pytest.approx(scores[0])
    FewShotModel.load(copy / "artifacts/bundle").check()


# On a cluster


GIVEN = {
    "repository": "https://git.example.org/team/fewshot.git",
    "data_revision": "4f2c",
    "image": "registry.example.org/reptile-train@sha256:" + 64 * "0",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path) -> Iterator[KubeflowServer]:
    monkeypatch.chdir(root)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN", "KF_PIPELINES_UI_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    server = KubeflowServer()
    yield server
    server.close()
    assert server.broken == []


def sweep(server: KubeflowServer, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    given = [f"--param={name}={value}" for name, value in GIVEN.items()]
    program = ["pipeline", "sweep", *given, *arguments, "--host", server.address]
    monkeypatch.setattr(sys, "argv", program)
    with pytest.raises(SystemExit) as end:
        command.main()
    return int(end.value.code or 0)


def test_a_sweep_is_one_run_of_the_compiled_sweep(
    server: KubeflowServer, monkeypatch: pytest.MonkeyPatch, params: Path
) -> None:
    changes = ("-S", "train.seed=3,4", "-S", "evaluate.tasks=50", "--name", "seeds")
    assert sweep(server, monkeypatch, *changes) == 0
    (run,) = server.runs.values()
    assert run["display_name"] == "seeds"
    sent = run["runtime_config"]["parameters"]
    expected = candidates(params, ["train.seed=3,4", "evaluate.tasks=50"])
    assert sent.pop("train_settings") == [each.train.model_dump_json() for each in expected]
    assert sent.pop("evaluate_settings") == expected[0].evaluate.model_dump_json()
    assert sent == GIVEN, "other settings are those that were compiled"
    (content,) = server.uploads.values()
    assert content == SWEEP.read_bytes()


def test_settings_in_a_file_of_inputs_stay_unless_they_are_swept(
    server: KubeflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inputs = tmp_path / "inputs.yaml"
    inputs.write_text("evaluate_settings: {tasks: 7}\ntrain_settings: ['{}']\n")
    arguments = ("-S", "train.seed=3,4", "--inputs", str(inputs))
    assert sweep(server, monkeypatch, *arguments) == 0
    (run,) = server.runs.values()
    sent = run["runtime_config"]["parameters"]
    assert json.loads(sent["evaluate_settings"]) == {"tasks": 7}
    assert len(sent["train_settings"]) == 2


def test_pipeline_and_version_are_described_and_named_for_people(
    server: KubeflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep(server, monkeypatch, "-S", "train.seed=3,4") == 0
    (pipeline,), (version,) = server.pipelines.values(), server.versions.values()
    assert pipeline["display_name"] == "reptile-sweep"
    assert "chooses by validation" in pipeline["description"]
    sha256 = hashlib.sha256(SWEEP.read_bytes()).hexdigest()
    assert version["display_name"] == f"{__version__}-{sha256[:12]}"
    assert version["description"].endswith(sha256)


def test_nothing_is_sent_of_a_sweep_that_cannot_be(
    server: KubeflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep(server, monkeypatch, "-S", "train.seed=3") == 2
    assert not server.runs
    assert not server.uploads
