"""`reptile check-model` as a person meets it."""

from pathlib import Path

import pytest

from reptile import cli


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *changes: str) -> int:
    (folder / "params.yaml").write_text(
        "prepare: {channels: grey, image_size: 16}\n"
        "train: {device: cpu, ways: 3, inner_batch: 4, model: {name: resnet12, filters: 2}}\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["reptile", "check-model", *changes])
    with pytest.raises(SystemExit) as stop:
        cli.run()
    return int(stop.value.code or 0)


def test_it_shows_the_network_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "-S", "train.adapt=head") == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line[:18].strip(): line[18:].strip() for line in lines}
    assert shown["network"] == "resnet12"
    assert shown["input"] == "1 x 16 x 16"
    assert shown["features"] == "20"
    assert shown["adapted"].startswith("63 ")  # 3 outputs of 20 features, and their biases
    assert shown["cut"].startswith("after mean: 20 values an image")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.adapt=layer4.*", "train.adapt: 'layer4.*' must be all, none, head, norms"),
        ("train.adapt=[layer4.*]", "no parameter of resnet12 matches 'layer4.*'"),
        ("train.model.name=resnet13", "train.model.name: 'resnet13' must be conv4, mlp, resnet12"),
        ("train.model.weights=start.pth", "train.model.weights = start.pth: no such file"),
        ("prepare.image_size=8", "train.model.input_size sets the size of its input"),
    ],
)
def test_what_cannot_train_is_one_sentence(
    change: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, tmp_path, "-S", change) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error: ")
    assert words in error
