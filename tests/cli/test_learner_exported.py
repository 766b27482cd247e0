"""The bundle has the learner that the evaluation names."""

import json
import sys
from pathlib import Path

import pytest
from patterns import draw_letters

from reptile import cli


@pytest.mark.parametrize("learner", ["prototypes", "ridge"])
def test_a_learner_without_adaptation_is_exported_and_verified(
    learner: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_letters(tmp_path / "letters", groups=5, classes=6, images=12)
    (tmp_path / "params.yaml").write_text(
        "prepare: {source: letters, cross_domain: [], image_size: 14, validation: 1, test: 2,"
        " rotations: false, images_per_class: 8}\n"
        "train: {model: {filters: 8}, ways: 4, train_shots: 5, meta_iterations: 20,"
        " checkpoint_every: 20, validation_tasks: 2}\n"
        f"evaluate: {{tasks: 6, shots: [1, 2], steps: 3, learner: {learner}}}\n"
        "export: {max_steps: 10, max_support: 30, gate: {above_random: -1.0, insist: true}}\n"
        "verify: {tasks: 6, steps: 3}\n"
    )

    def run(*words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["reptile", *words])
        with pytest.raises(SystemExit) as stop:
            cli.run()
        out = capsys.readouterr()
        return stop.value.code, out.out + out.err

    for stage in ("prepare", "train", "evaluate", "export", "verify"):
        code, printed = run(stage)
        assert not code, printed[-600:]
    assert "checks passed" in printed
    manifest = json.loads((tmp_path / "artifacts/bundle/manifest.json").read_text())
    assert manifest["learner"] == "closed_form"
    assert manifest["head"] == {"prototypes": "protonet", "ridge": "ridge"}[learner]
