"""What the tests of all rooms share: threads that do not spin, small data, a bundle, the root."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch, for these and for child processes
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only lose by more

import pytest
from patterns import make_data

from reptile.data.dataset import PreparedData

if TYPE_CHECKING:
    from machines import Made

    from reptile.learn.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def data() -> PreparedData:
    return make_data()


@pytest.fixture(scope="session")
def checkpoint(data: PreparedData) -> "Checkpoint":
    """A conv4 after a few meta-steps on the patterns."""
    from bundles import trained_checkpoint  # imports torch, which most rooms' tests do without

    return trained_checkpoint(data)


@pytest.fixture(scope="session")
def exported(
    checkpoint: "Checkpoint", data: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The checkpoint's bundle, not to be changed."""
    from bundles import write_bundle

    folder = tmp_path_factory.mktemp("export") / "bundle"
    write_bundle(folder, data, checkpoint)
    return folder


@pytest.fixture(scope="session")
def closed_form_checkpoint(data: PreparedData) -> "Checkpoint":
    """A conv4 for ridge, not trained, with population statistics of the patterns."""
    from bundles import make_closed_form_checkpoint

    return make_closed_form_checkpoint(data, "ridge")


@pytest.fixture(scope="session")
def closed_form_bundle(
    closed_form_checkpoint: "Checkpoint",
    data: PreparedData,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The closed-form checkpoint's bundle, not to be changed."""
    from bundles import write_bundle

    folder = tmp_path_factory.mktemp("closed-form") / "bundle"
    write_bundle(folder, data, closed_form_checkpoint)
    return folder


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Made]":
    """Bundles of a table by the name of their learner, each made once and not to be changed."""
    made: dict[str, Made] = {}

    def make(name: str) -> "Made":
        from machines import make_bundle

        if name not in made:
            made[name] = make_bundle(name, tmp_path_factory.mktemp("machines"))
        return made[name]

    return make


@pytest.fixture
def root() -> Path:
    """The project's root folder."""
    return Path(__file__).parent.parent
