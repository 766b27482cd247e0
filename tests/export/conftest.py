"""Small checkpoints, and tasks for them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundles import WAYS, make_checkpoint

from reptile.export.reference import SupportSet
from reptile.learn.checkpoint import Checkpoint
from reptile.minibatches import mini_batches

Shape = tuple[int, int, int]


@pytest.fixture(scope="session", name="make_checkpoint")
def _make_checkpoint() -> Callable[..., Checkpoint]:
    return make_checkpoint


@pytest.fixture(scope="session")
def make_task() -> Callable[..., SupportSet]:
    """A support set of random pixels."""

    def make(shape: Shape, size: int, steps: int, batch: int = 4, seed: int = 0) -> SupportSet:
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
        return SupportSet(images, np.arange(size) % WAYS, mini_batches(rng, size, batch, steps))

    return make


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))
