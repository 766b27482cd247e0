"""Presets: the papers' own numbers, typed again here; and the same settings by every way in."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from reptile import cli
from reptile.errors import InputError
from reptile.experiments.presets import changes, dvc_command, load_preset, preset_names, preset_path
from reptile.settings import Settings, load_settings

# Hyper-parameters: rate, inner batch, inner steps, iterations, train-shots, batch at test.
OMNIGLOT_5 = 1e-3, 10, 5, 100_000, 10, 5
OMNIGLOT_20 = 5e-4, 20, 10, 200_000, 10, 10
# The tables of results: ways, shots, transductive, non-transductive.
PAPER: dict[str, tuple[tuple[float, ...], int, int, tuple[float, float], tuple[float, float]]] = {
    "omniglot-5w1s": (OMNIGLOT_5, 5, 1, (97.68, 0.04), (95.39, 0.09)),
    "omniglot-5w5s": (OMNIGLOT_5, 5, 5, (99.48, 0.06), (98.90, 0.10)),
    "omniglot-20w1s": (OMNIGLOT_20, 20, 1, (89.43, 0.14), (88.14, 0.15)),
    "omniglot-20w5s": (OMNIGLOT_20, 20, 5, (97.12, 0.32), (96.65, 0.33)),
    "mini-imagenet-5w1s": ((1e-3, 10, 8, 1e5, 15, 5), 5, 1, (49.97, 0.32), (47.07, 0.26)),
    "mini-imagenet-5w5s": ((1e-3, 10, 8, 1e5, 15, 15), 5, 5, (65.99, 0.58), (62.74, 0.37)),
}


def load(name: str, *overrides: str) -> Settings:
    return load_settings(preset_path(name), overrides)


def test_every_row_of_the_papers_tables_has_its_preset() -> None:
    assert set(PAPER) | {"mnist-article", "omniglot-gradients"} <= set(preset_names())


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_has_the_numbers_of_the_papers_tables(name: str) -> None:
    settings = load(name)
    hyper, ways, shots, transductive, non_transductive = PAPER[name]
    train, test = settings.train, settings.evaluate
    assert hyper == (
        train.optimizer.learning_rate,
        train.inner_batch,
        train.inner_steps,
        train.meta_iterations,
        train.train_shots,
        test.batch,
    )
    assert (train.ways, test.shots, test.steps, test.queries, test.tasks) == (
        ways,
        (shots,),
        50,
        1,
        10_000,
    )
    assert (train.meta_step, train.meta_step_final, train.meta_batch) == (1, 0, 5)
    assert (train.algorithm, train.optimizer.name, train.optimizer.state) == (
        "reptile",
        "adam",
        "sequential",
    )
    omniglot = name.startswith("omniglot")
    assert settings.prepare.image_size == (28 if omniglot else 84)
    assert settings.prepare.rotations == omniglot
    assert train.model.filters == (64 if omniglot else 32)
    assert train.model.downsampling == ("stride" if omniglot else "pool")
    paper = load_preset(name).paper
    assert paper.accuracy == {
        "transductive": transductive,
        "non_transductive": non_transductive,
    }
    assert "1803.02999" in paper.source
    assert (settings.verify.shots, settings.export.gate.shots) == (shots, shots)


def test_the_base_of_the_gradient_study_takes_four_batches_that_share_no_image() -> None:
    train = load("omniglot-gradients").train
    assert train.ways * train.train_shots == train.inner_steps * train.inner_batch == 100
    assert (train.optimizer.name, train.optimizer.learning_rate) == ("sgd", 0.003)
    assert (train.meta_iterations, train.meta_batch) == (40_000, 1)


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


@pytest.mark.parametrize("name", [*PAPER, "mnist-article", "omniglot-gradients"])
def test_a_preset_holds_only_what_differs_from_the_defaults(name: str) -> None:
    written = leaves(yaml.safe_load(preset_path(name).read_text()))
    default = leaves(Settings().model_dump(mode="json"))
    assert not {key for key, value in written.items() if default.get(key, ...) == value}


@pytest.mark.parametrize("name", preset_names())
def test_dvcs_own_options_give_the_settings_of_the_preset(
    name: str, root: Path, tmp_path: Path
) -> None:
    from dvc.utils.hydra import apply_overrides

    params = tmp_path / "params.yaml"
    shutil.copy(root / "params.yaml", params)
    words = shlex.split(dvc_command(load(name), params))
    assert words[:3] == ["dvc", "exp", "run"]
    assert set(words[3::2]) == {"-S"}
    apply_overrides(params, words[4::2])
    assert load_settings(params) == load(name)
    assert dvc_command(load(name), params) == "dvc exp run", "nothing is left to change"


def test_dvc_exp_run_takes_the_printed_line(root: Path, tmp_path: Path) -> None:
    """DVC itself, in a repository whose one stage copies the parameters that it was given."""
    shutil.copy(root / "params.yaml", tmp_path)
    (tmp_path / "dvc.yaml").write_text(
        f"stages: {{see: {{cmd: '{sys.executable} -c \"import shutil; "
        'shutil.copy(\\"params.yaml\\", \\"seen.yaml\\")"\', '
        "params: [prepare, train, evaluate, export, verify], outs: [seen.yaml]}}\n"
    )
    line = dvc_command(load("mini-imagenet-5w5s"), tmp_path / "params.yaml")
    dvc = f"{sys.executable} -m dvc"
    for command in (
        "git init -q",
        f"{dvc} init -q",
        "git add -A",
        "git -c user.name=a -c user.email=a@b.c commit -qm start",
        line.replace("dvc", dvc, 1),
    ):
        done = subprocess.run(shlex.split(command), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
    assert load_settings(tmp_path / "seen.yaml") == load("mini-imagenet-5w5s")


def test_what_is_set_goes_before_the_preset_and_the_preset_before_the_defaults() -> None:
    settings = load("omniglot-20w1s", "train.meta_iterations=5000", "prepare.source=alphabets.zip")
    assert settings.train.meta_iterations == 5000
    assert settings.train.optimizer.learning_rate == 0.0005
    assert settings.train.meta_batch == Settings().train.meta_batch
    assert changes(settings, load("omniglot-20w1s")) == {
        "train.meta_iterations": (5000, 200_000),
        "prepare.source": ("alphabets.zip", "datasets/omniglot"),
    }


def test_an_unknown_preset_names_those_that_are_like_it() -> None:
    with pytest.raises(InputError, match="omniglot-5w1s"):
        preset_path("omniglot-5w1")


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["reptile", *arguments])
    try:
        cli.run()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_commands_take_and_show_presets(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    change = ["-S", "prepare.source=digits"]
    assert run(["prepare", "--preset", "mnist-article", *change], monkeypatch) == 0
    assert "20 train, 0 validation, 5 test" in capsys.readouterr().out
    assert run(["presets"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in preset_names())
    assert "97.68 ± 0.04" in shown
    shutil.copy(root / "params.yaml", tmp_path)
    assert run(["presets", "omniglot-5w5s"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown.split("# with DVC")[0])["evaluate"]["shots"] == [5]
    assert "dvc exp run -S prepare.source=datasets/omniglot" in shown
    both = ["train", "--preset", "mnist-article", "--params", "params.yaml"]
    assert run(both, monkeypatch) == 2
    assert "name one of them" in capsys.readouterr().err
