"""The public surface: a module of the user's own, from data to a saved initialisation."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patterns import make_data
from torch import nn

import reptile
from reptile.data.dataset import PreparedData


class Swish(nn.Module):
    """An activation that no network of the library has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.7 * x)


def make_module(shape: tuple[int, ...], outputs: int) -> nn.Module:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(shape[0], 8, 3, stride=2), nn.BatchNorm2d(8), Swish())
    width = features(torch.zeros(1, *shape)).numel()
    return nn.Sequential(features, nn.Flatten(), nn.Linear(width, outputs))


def settings_of(**changes: Any) -> reptile.TrainSettings:
    values: dict[str, Any] = {
        "engine": "eager",
        "device": "cpu",
        "ways": 3,
        "train_shots": 4,
        "inner_steps": 3,
        "inner_batch": 4,
        "meta_batch": 2,
        "meta_iterations": 6,
        "checkpoint_every": 2,
        "validation_tasks": 2,
    }
    return reptile.TrainSettings.model_validate(values | changes)


@pytest.fixture(scope="module")
def data() -> PreparedData:
    return make_data()


@pytest.mark.parametrize("state", ["sequential", "parallel"])
def test_a_module_is_trained_alike_on_both_engines(data: PreparedData, state: str) -> None:
    module = make_module(data.image_shape, 3)
    curves = [
        reptile.train(
            data, settings_of(engine=engine, optimizer={"name": "sgd", "state": state}), module
        ).info.curve
        for engine in ("eager", "batched", "auto")
    ]
    losses = np.array([[point.loss for point in curve] for curve in curves])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_array_equal(losses[2], losses[0])


def test_a_saved_module_is_evaluated_as_before(data: PreparedData, tmp_path: Path) -> None:
    module = make_module(data.image_shape, 3)
    trained = reptile.train(data, settings_of(), module)
    trained.save(tmp_path / "saved")
    other = make_module(data.image_shape, 3)
    nn.init.constant_(other.get_parameter("2.weight"), 9.0)
    loaded = reptile.load(tmp_path / "saved", other)
    assert torch.equal(loaded.checkpoint.state.weights, trained.checkpoint.state.weights)
    protocol = reptile.EvaluateSettings(tasks=4, shots=(1,), steps=5)
    ours, theirs = (each.evaluate(data, protocol) for each in (trained, loaded))
    assert ours == theirs
    assert ours.score("patterns", 1, "trained", "frozen").mean >= 0
    images = torch.rand(4, *data.image_shape)
    torch.testing.assert_close(loaded.module()(images), trained.module()(images))


def test_training_a_module_resumes_as_if_it_had_never_stopped(
    data: PreparedData, tmp_path: Path
) -> None:
    module = make_module(data.image_shape, 3)
    whole = reptile.train(data, settings_of(), module)

    def stop(progress: Any) -> None:
        if progress.iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reptile.train(data, settings_of(), module, work=tmp_path, on_progress=stop)
    seen: list[int] = []
    resumed = reptile.train(
        data,
        settings_of(),
        module,
        work=tmp_path,
        resume=True,
        on_progress=lambda progress: seen.append(progress.iteration),
    )
    assert seen == [3, 4, 5, 6]
    assert torch.equal(resumed.checkpoint.state.weights, whole.checkpoint.state.weights)


def test_what_cannot_be_done_with_a_module_is_one_sentence(
    data: PreparedData, tmp_path: Path
) -> None:
    module = make_module(data.image_shape, 3)
    with pytest.raises(reptile.InputError, match="native: supports conv4 and mlp, not torch"):
        reptile.train(data, settings_of(engine="native"), module)
    trained = reptile.train(data, settings_of(meta_iterations=2), module)
    trained.save(tmp_path / "saved")
    with pytest.raises(reptile.InputError, match=r"give such a module, as in reptile\.load"):
        reptile.load(tmp_path / "saved")
    small = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(data.image_shape)), 3))
    with pytest.raises(reptile.InputError, match="not the weights of"):
        reptile.load(tmp_path / "saved", small)


def test_the_example_of_the_readme_runs_on_both_engines(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (root / "README.md").read_text().split("## Train your own network", 1)[1]
    code = section.split("```python\n", 1)[1].split("```", 1)[0]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15
    monkeypatch.chdir(tmp_path)
    patterns = make_data(classes={"train": 60})
    images = torch.from_numpy(np.array(patterns.images)).float() / 255
    rows = np.repeat(np.arange(len(patterns.classes)), [c.count for c in patterns.classes])
    pairs = torch.utils.data.TensorDataset(images, torch.from_numpy(rows))
    losses = []
    for engine in ("eager", "batched"):
        torch.manual_seed(0)
        names: dict[str, Any] = {"dataset": pairs}
        changed = code.replace("meta_iterations=1000", "meta_iterations=4, checkpoint_every=2")
        changed = changed.replace("ways=5", f"ways=5, device='cpu', engine={engine!r}")
        changed = changed.replace("tasks=600", "tasks=4")
        export = '("my-bundle", data)'
        changed = changed.replace(f"again.verify{export}", "").replace(f"again.export{export}", "")
        changed = changed.replace('model = reptile.FewShotModel.load("my-bundle")', "")
        assert changed.count(engine) == 1 and "tasks=4" in changed
        exec(compile(changed, "README.md", "exec"), names)
        losses.append([point.loss for point in names["trained"].info.curve])
        assert names["again"].info == names["trained"].info
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)


def test_the_example_of_the_readme_ends_in_a_bundle_that_was_verified(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (root / "README.md").read_text().split("## Train your own network", 1)[1]
    code = section.split("```python\n", 1)[1].split("```", 1)[0]
    monkeypatch.chdir(tmp_path)
    patterns = make_data(classes={"train": 60})
    images = torch.from_numpy(np.array(patterns.images)).float() / 255
    rows = np.repeat(np.arange(len(patterns.classes)), [c.count for c in patterns.classes])
    torch.manual_seed(0)
    names: dict[str, Any] = {"dataset": torch.utils.data.TensorDataset(images, torch.tensor(rows))}
    changed = code.replace("meta_iterations=1000", "meta_iterations=20, device='cpu'")
    changed = changed.replace("tasks=600", "tasks=4")
    quick = "verify('my-bundle', data, reptile.VerifySettings(tasks=20))"
    changed = changed.replace('again.verify("my-bundle", data)', f"report = again.{quick}")
    assert "report" in changed and "tasks=4" in changed and "device" in changed
    exec(compile(changed, "README.md", "exec"), names)
    assert names["report"]["passed"] and len(names["report"]["checks"]) >= 46
    data, model = names["data"], names["model"]
    manifest = model.manifest
    assert "pixel_range" not in manifest["task"]
    classes = data.split("test")
    support = np.concatenate([data.images[start : start + 5] for start in classes.starts[:5]])
    queries = np.stack([data.images[start + 6] for start in classes.starts[:5]])
    adapted = model.adapt(support, np.repeat(list("abcde"), 5))
    assert np.mean(np.array(adapted.predict(queries).labels) == list("abcde")) >= 0.6
    with pytest.raises(reptile.InputError, match="that are no images"):
        _ = model.pixel_shape


def test_every_public_name_exists_and_is_listed() -> None:
    script = "import reptile; print(*(getattr(reptile, n).__name__ for n in reptile.__all__))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == reptile.__all__
    assert set(reptile.__all__) <= set(dir(reptile))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = reptile.trian
