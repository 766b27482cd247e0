"""Training through a head on towers: engines, shares, checkpoints, and their graphs."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from patterns import make_data
from safetensors.torch import save_file
from torch import Tensor, nn

from reptile.export.closed_form import build_closed_form_graphs
from reptile.learn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from reptile.learn.engines import make_engine
from reptile.learn.run import run_training
from reptile.learn.shares import candidate_shares
from reptile.models import size, unflatten
from reptile.settings import TrainSettings

DATA = make_data()
ROWS = np.array([3, 40, 3, 77, 200, 310, 9])


class Blind(nn.Module):
    """A backbone that sees next to nothing of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the first pixels' noise."""
        result: Tensor = self.layer(x[:, 0, 0, :4])
        return result


def blind() -> nn.Module:
    """Return it, as a package's function does."""
    return Blind()


def settings_of(*towers: dict[str, object], **changes: object) -> TrainSettings:
    values: dict[str, object] = {
        "algorithm": "ridge",
        "model": {"towers": towers},
        "ways": 4,
        "episode": {"shots": [1, 3], "queries": 2, "learning_rate": 0.01},
        "meta_batch": 1,
        "meta_iterations": 30,
        "checkpoint_every": 10,
        "validation_tasks": 10,
        "device": "cpu",
    }
    return TrainSettings.model_validate(values | changes)


CONV4: dict[str, object] = {"name": "conv4", "filters": 4}
BLIND: dict[str, object] = {"name": f"module:{__name__}.blind", "adapt": "none"}


@pytest.fixture(scope="module")
def trained() -> Checkpoint:
    return run_training(settings_of(CONV4, BLIND), DATA)


def test_a_tower_that_sees_nothing_gets_the_smaller_share(trained: Checkpoint) -> None:
    conv4, blind = trained.info.shares
    assert conv4 + blind == 1
    assert conv4 > 0.5


def test_every_engine_computes_the_features_that_the_network_does(trained: Checkpoint) -> None:
    model, settings = trained.model, trained.info.settings
    weights = trained.state.weights[: size(model)]
    images = torch.from_numpy(np.asarray(DATA.images[ROWS])).float() / 255
    statistics = trained.closed_form.statistics
    for name in ("auto", "eager"):
        engine = make_engine(name, model, settings.optimizer, DATA.images, torch.device("cpu"))
        for given in (None, statistics):
            wanted = model.features(unflatten(model, weights), images, given)
            torch.testing.assert_close(engine.features(weights, ROWS, given), wanted)
        measured = engine.statistics(weights, ROWS)
        for mine, theirs in zip(
            measured, model.statistics(unflatten(model, weights), images), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


def test_a_checkpoint_keeps_shares_and_the_frozen_tower(
    trained: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "checkpoint", trained)
    again = load_checkpoint(tmp_path / "checkpoint")
    assert again.info == trained.info
    images = torch.from_numpy(np.asarray(DATA.images[ROWS])).float() / 255
    torch.testing.assert_close(
        again.closed_form.features(images), trained.closed_form.features(images), rtol=0, atol=0
    )


def test_a_frozen_network_trains_on_the_statistics_that_it_is_used_with() -> None:
    settings = settings_of({**BLIND}, meta_iterations=3)
    checkpoint = run_training(settings, DATA)
    before = run_training(settings.model_copy(update={"meta_iterations": 1}), DATA)
    assert checkpoint.info.shares == (1.0,)
    assert len(checkpoint.state.weights) == 2  # the head's strength and scale alone
    for mine, theirs in zip(
        checkpoint.closed_form.statistics, before.closed_form.statistics, strict=True
    ):
        assert torch.equal(mine.mean, theirs.mean)


def test_a_trained_and_a_frozen_tower_start_from_a_checkpoint(
    trained: Checkpoint, tmp_path: Path
) -> None:
    alone = run_training(settings_of(CONV4), DATA)
    # What a training of conv4 alone leaves: its names without the tower's place.
    start = unflatten(alone.model, alone.state.weights[: size(alone.model)])
    path = tmp_path / "weights.safetensors"
    save_file({f"weights/{k.removeprefix('0.')}": v.contiguous() for k, v in start.items()}, path)
    given = {**CONV4, "weights": str(path)}
    settings = settings_of(given, {**given, "adapt": "none"}, meta_iterations=2, ways=3)
    checkpoint = run_training(settings, DATA)
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    path.unlink()  # the checkpoint has them
    again = load_checkpoint(tmp_path / "checkpoint")
    assert again.info == checkpoint.info and again.info.weights_sha256
    images = torch.from_numpy(np.asarray(DATA.images[ROWS])).float() / 255
    torch.testing.assert_close(
        again.closed_form.features(images), checkpoint.closed_form.features(images), rtol=0, atol=0
    )
    first, second = again.model.towers  # type: ignore[attr-defined]
    wanted = unflatten(first, alone.state.weights[: size(first)])
    for name, value in wanted.items():
        assert torch.equal(unflatten(first, first.initialise(9))[name], value)
        assert torch.equal(second.fixed[name], value)
        moved = unflatten(first, again.state.weights[: size(first)])[name]
        assert not torch.equal(moved, value)
    session = ort.InferenceSession(build_closed_form_graphs(again, 10)["embed"].SerializeToString())
    (features, *_) = session.run(None, {"images": np.asarray(DATA.images[ROWS], np.float32)})
    np.testing.assert_allclose(features, again.closed_form.features(images), atol=1e-4)


def test_the_graphs_compute_what_the_learner_does(trained: Checkpoint) -> None:
    graphs = build_closed_form_graphs(trained, 10)
    session = ort.InferenceSession(graphs["few_shot"].SerializeToString())
    images, labels = np.asarray(DATA.images[ROWS]), np.array([0, 1, 2, 0, 1])
    feeds = {
        "support_images": images[:5].astype(np.float32),
        "support_labels": labels,
        "query_images": images[5:].astype(np.float32),
    }
    finite, logits = session.run(["finite", "logits"], feeds)
    assert finite
    learner = trained.closed_form
    features = learner.features(torch.from_numpy(images).float() / 255)
    wanted = learner.outputs(features[:5], torch.from_numpy(labels), features[5:])
    np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 4, 6, 8, 10])
def test_the_shares_that_are_tried_stay_few_with_many_towers(count: int) -> None:
    tried = candidate_shares(count)
    assert len(set(tried)) == len(tried) <= 60
    assert all(sum(shares) == pytest.approx(1) for shares in tried)
    for tower in range(count):  # each may count alone, or not at all
        assert tuple(float(tower == each) for each in range(count)) in tried
    if count < 4:
        assert (3 / 8, 5 / 8, *[0.0] * (count - 2)) in tried
