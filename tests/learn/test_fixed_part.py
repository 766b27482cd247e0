"""Engines run the fixed part of a network once an image; the results stay those of the whole."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reptile.learn.engines.fixed
from reptile.data.dataset import PreparedData, load_prepared
from reptile.errors import InputError
from reptile.learn.engines import make_engine
from reptile.learn.engines.base import Engine
from reptile.learn.engines.fixed import BATCH, FixedValues, without_fixed_part
from reptile.learn.optimizer import fresh_state
from reptile.models import ModuleNetwork, build_model, initialise, unflatten
from reptile.objectives import CLASSIFICATION
from reptile.settings import Adapt, LastBlocks, ModelSettings, TrainSettings
from reptile.tasks import FewShotProtocol, Task, held_out_task, random_stream, training_tasks

CPU = torch.device("cpu")
ADAPTS: tuple[Adapt, ...] = ("all", "head")
SETTINGS = TrainSettings(
    ways=3, train_shots=4, inner_steps=3, inner_batch=5, meta_batch=2,
    model=ModelSettings(name="resnet12", filters=2, input_size=16),
)  # fmt: skip


def network(adapt: Adapt) -> ModuleNetwork:
    model = build_model(SETTINGS.model, 3, (1, 12, 12), adapt=adapt, seed=3)
    assert isinstance(model, ModuleNetwork)
    return model


def engine(name: str, adapt: Adapt, data: PreparedData) -> Engine:
    return make_engine(name, network(adapt), SETTINGS.optimizer, data.images, CPU)


def tasks(data: PreparedData) -> list[Task]:
    return training_tasks(data.split("train"), SETTINGS, 0)


@pytest.mark.parametrize("adapt", ["head", LastBlocks(last=1), "norms", "all"])
def test_both_engines_adapt_and_predict_the_same(adapt: Adapt, data: PreparedData) -> None:
    eager, batched = (engine(name, adapt, data) for name in ("eager", "batched"))
    weights = initialise(eager.model, 0)
    first = eager.adapt(weights, fresh_state(weights), tasks(data))
    second = batched.adapt(weights, fresh_state(weights), tasks(data))
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-4, atol=1e-5)
    protocol = FewShotProtocol(3, 2, 2, 1, 3)
    drawn = [
        held_out_task(random_stream(0, 0, number), data.split("test"), protocol)  # type: ignore[arg-type]
        for number in range(2)
    ]
    for mode in ("transductive", "non_transductive", "frozen"):
        torch.testing.assert_close(
            eager.predict(first.weights, drawn, mode),
            batched.predict(first.weights, drawn, mode),
            rtol=1e-4,
            atol=1e-4,
        )


def test_adapting_the_head_is_training_a_linear_layer_on_features(data: PreparedData) -> None:
    model = network("head")
    eager = engine("eager", "head", data)
    weights = initialise(model, 0)
    drawn = tasks(data)
    adapted = eager.adapt(weights, fresh_state(weights), drawn)
    for task, result, losses in zip(drawn, adapted.weights, adapted.losses, strict=True):
        images = torch.from_numpy(data.images[task.support]) / 255
        features = model.features(unflatten(model, weights), images).detach()
        head = nn.Linear(model.feature_size, 3)
        with torch.no_grad():
            for name, value in unflatten(model, weights).items():
                head.get_parameter(name.removeprefix("head.")).copy_(value)
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-3, betas=(0.0, 0.999), eps=1e-8)
        labels = torch.from_numpy(task.support_targets)
        for batch, loss_there in zip(task.batches, losses, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(head(features[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(loss.detach(), loss_there)
        trained = unflatten(model, result)
        torch.testing.assert_close(head.weight.detach(), trained["head.weight"])
        torch.testing.assert_close(head.bias.detach(), trained["head.bias"])


def test_features_are_those_of_the_whole_network(data: PreparedData) -> None:
    model = network(LastBlocks(last=1))
    rows = np.array([3, 1, 3, 40])
    images = torch.from_numpy(data.images[rows]) / 255
    weights = initialise(model, 0)
    params = unflatten(model, weights)
    given = model.statistics(params, torch.rand(9, 1, 12, 12))
    for name in ("eager", "batched"):
        there = engine(name, LastBlocks(last=1), data)
        torch.testing.assert_close(there.images(rows), images)
        torch.testing.assert_close(there.features(weights, rows), model.features(params, images))
        torch.testing.assert_close(
            there.features(weights, rows, given), model.features(params, images, given)
        )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(12, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.rnn(x[:, 0])[0][:, -1])
        return outputs


def test_what_cannot_be_batched_is_refused_by_name_and_runs_with_a_fixed_gru(
    data: PreparedData,
) -> None:
    whole, head = (
        ModuleNetwork(Recurrent(), (1, 12, 12), 3, CLASSIFICATION, adapt=adapt) for adapt in ADAPTS
    )
    with pytest.raises(InputError, match=r"batched: cannot run .*Recurrent \(.*gru.*; use auto"):
        make_engine("batched", whole, SETTINGS.optimizer, data.images, CPU)
    weights = initialise(head, 0)
    eager, batched = (
        make_engine(name, head, SETTINGS.optimizer, data.images, CPU).adapt(
            weights, fresh_state(weights), tasks(data)
        )
        for name in ("eager", "batched")
    )
    torch.testing.assert_close(eager.weights, batched.weights)


class Counted(nn.Module):
    """Counts the images that its fixed layer has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        return outputs


class Body(nn.Module):
    seen = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(144, 6)

    def forward(self, x: Tensor) -> Tensor:
        Body.seen += len(x)
        return torch.tanh(self.linear(x.flatten(1)))


def values(data: PreparedData, module: nn.Module) -> FixedValues:
    model = ModuleNetwork(module, (1, 12, 12), 3, CLASSIFICATION, adapt="head")
    _, there = without_fixed_part(model, data.images, CPU)
    assert isinstance(there, FixedValues)
    Body.seen = 0
    return there


@pytest.fixture
def on_disk(data: PreparedData, tmp_path: Path) -> PreparedData:
    """The data as `prepare` leaves it."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    np.save(folder / "images.npy", data.images)
    (folder / "dataset.json").write_text(data.index.model_dump_json())
    return load_prepared(folder)


def test_an_image_runs_once_also_over_processes(on_disk: PreparedData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Counted()
    rows = np.array([[5, 9], [7, 5]])
    first = values(on_disk, module)
    expected = first(rows)
    assert Body.seen == BATCH
    assert torch.equal(first(rows[::-1].copy()), expected.flip(0))
    again = values(on_disk, module)  # as another process has it
    assert torch.equal(again(rows), expected)
    assert Body.seen == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [
        "prepared", "prepared.fixed",
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "prepared").iterdir()} == {
        "images.npy",
        "dataset.json",
    }


def test_values_do_not_depend_on_the_order_of_calls(data: PreparedData) -> None:
    module = Counted()
    together, alone = values(data, module), values(data, module)
    rows = np.arange(20)
    kept = torch.cat([alone(rows[place : place + 1]) for place in (rows[::-1]).tolist()])
    assert torch.equal(together(rows), kept.flip(0))


def test_other_weights_or_images_have_other_values(on_disk: PreparedData, tmp_path: Path) -> None:
    module, rows = Counted(), np.array([3])
    values(on_disk, module)(rows)
    other = Counted()
    there = values(on_disk, other)(rows)
    assert Body.seen == BATCH
    torch.testing.assert_close(there, other.body(torch.from_numpy(on_disk.images[rows]) / 255))
    changed = np.array(on_disk.images)
    changed[3] = 255 - changed[3]
    np.save(tmp_path / "prepared/images.npy", changed)
    data = replace(on_disk, images=np.load(tmp_path / "prepared/images.npy", mmap_mode="r"))
    there = values(data, module)(rows)
    assert Body.seen == BATCH
    torch.testing.assert_close(there, module.body(torch.from_numpy(changed[rows]) / 255))


def test_a_damaged_value_is_computed_again(on_disk: PreparedData, tmp_path: Path) -> None:
    module, rows = Counted(), np.array([2, 4])
    expected = values(on_disk, module)(rows)
    (file,) = (tmp_path / "prepared.fixed").iterdir()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert torch.equal(values(on_disk, module)(rows), expected)
    assert Body.seen == BATCH


def test_old_files_go_and_a_full_one_takes_no_more(
    on_disk: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "prepared.fixed"
    values(on_disk, Counted())(np.arange(3))
    (stale,) = folder.iterdir()
    monkeypatch.setattr(reptile.learn.engines.fixed, "LIMIT", 50)
    module = Counted()
    there = values(on_disk, module)
    assert stale not in folder.iterdir()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(there(np.arange(6)), there(np.arange(6)))
    assert Body.seen == 2 * BATCH
    assert "runs again each time" in caplog.text


def test_where_nothing_can_be_written_values_are_kept_for_the_process(
    on_disk: PreparedData, tmp_path: Path
) -> None:
    (tmp_path / "prepared.fixed").write_text("in the way")
    there, rows = values(on_disk, Counted()), np.arange(4)
    assert torch.equal(there(rows), there(rows))
    assert Body.seen == BATCH
