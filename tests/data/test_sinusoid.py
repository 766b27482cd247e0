"""Prepared sinusoids: points on true sine curves, tasks of them, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from reptile.data.dataset import PreparedData, load_prepared
from reptile.data.prepare import prepare
from reptile.errors import InputError
from reptile.learn.run import run_training
from reptile.settings import PrepareSettings, TrainSettings
from reptile.tasks import FewShotProtocol, held_out_task, training_tasks

SETTINGS = PrepareSettings(
    source="sinusoid", cross_domain=(), images_per_class=12, validation=0.04, test=0.16
)


@pytest.fixture(scope="module")
def sinusoids(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare(SETTINGS, tmp_path_factory.mktemp("sinusoid") / "prepared")


def curve(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit y = p·sin x + q·cos x by least squares: (amplitude, phase, largest residue)."""
    basis = np.stack([np.sin(x), np.cos(x)], axis=1).astype(np.float64)
    (p, q), *_ = np.linalg.lstsq(basis, y, rcond=None)
    return np.hypot(p, q), np.arctan2(q, p) % (2 * np.pi), np.abs(basis @ (p, q) - y).max()


def test_every_class_is_one_sinusoid_drawn_from_the_published_ranges(
    sinusoids: PreparedData,
) -> None:
    assert sinusoids.targets is not None
    found = []
    for entry in sinusoids.classes[:: len(sinusoids.classes) // 400]:
        rows = slice(entry.start, entry.start + entry.count)
        x, y = sinusoids.images[rows].ravel(), sinusoids.targets[rows].ravel()
        amplitude, phase, residue = curve(x, y)
        assert residue < 1e-5
        found.append((amplitude, phase))
    amplitudes, phases = np.array(found).T
    assert amplitudes.min() >= 0.1 - 1e-3
    assert amplitudes.max() <= 5 + 1e-3
    # Means of uniform draws, within four standard errors of 400.
    assert amplitudes.mean() == pytest.approx(2.55, abs=4 * 4.9 / np.sqrt(12 * 400))
    assert phases.mean() == pytest.approx(np.pi, abs=4 * 2 * np.pi / np.sqrt(12 * 400))
    inputs = np.asarray(sinusoids.images)
    assert np.abs(inputs).max() <= 5
    assert inputs.std() == pytest.approx(10 / np.sqrt(12), rel=0.01)


def test_splits_have_the_sizes_asked_for_and_share_no_sinusoid(sinusoids: PreparedData) -> None:
    starts = [sinusoids.split(name).starts for name in ("train", "validation", "test")]
    assert [len(start) for start in starts] == [20_000, 1_000, 4_000]
    assert len(np.unique(np.concatenate(starts))) == 25_000


def test_tasks_are_rows_of_one_sinusoid_with_its_values(sinusoids: PreparedData) -> None:
    settings = TrainSettings(ways=1, train_shots=12, inner_batch=10)
    learning = training_tasks(sinusoids.split("train"), settings, 3)[1]
    protocol = FewShotProtocol(ways=1, shots=5, queries=7, steps=2, batch=5)
    tested = held_out_task(np.random.default_rng(0), sinusoids.split("test"), protocol)
    assert learning.support_targets.shape == (12, 1)
    assert (tested.support_targets.shape, tested.query_targets.shape) == ((5, 1), (7, 1))
    assert len(np.unique(np.concatenate([tested.support, tested.query]))) == 12
    for rows, values in (
        (learning.support, learning.support_targets),
        (
            np.concatenate([tested.support, tested.query]),
            np.concatenate([tested.support_targets, tested.query_targets]),
        ),
    ):
        assert curve(sinusoids.images[rows].ravel(), values.ravel())[2] < 1e-5


def test_the_same_settings_give_the_same_data_and_another_seed_other(
    sinusoids: PreparedData, tmp_path: Path
) -> None:
    again = prepare(SETTINGS, tmp_path / "again")
    other = prepare(SETTINGS.model_copy(update={"split_seed": 1}), tmp_path / "other")
    assert again.content_sha256 == sinusoids.content_sha256 != other.content_sha256


def test_what_makes_no_sense_is_refused(sinusoids: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cross_domain"):
        prepare(SETTINGS.model_copy(update={"cross_domain": ("digits",)}), tmp_path / "data")
    with pytest.raises(InputError, match=r"train.ways = 5.*set train.ways to 1"):
        run_training(TrainSettings(ways=5, train_shots=10), sinusoids, tmp_path)


def test_one_way_tasks_of_images_are_refused(data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.ways = 1.*at least 2"):
        run_training(TrainSettings(ways=1, train_shots=10), data, tmp_path)


def test_damaged_targets_are_refused(tmp_path: Path) -> None:
    prepare(SETTINGS, tmp_path / "data")
    path = tmp_path / "data" / "targets.npy"
    np.save(path, np.zeros((5, 1), dtype=np.float32))
    with pytest.raises(InputError, match=r"targets.npy.*expected float32 of shape"):
        load_prepared(tmp_path / "data")
    path.unlink()
    with pytest.raises(InputError, match=r"targets.npy: no such file; run"):
        load_prepared(tmp_path / "data")
