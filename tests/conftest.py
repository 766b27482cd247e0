"""What the tests of all rooms share: threads that do not spin, small data, the project's root."""

import os
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch, for these and for child processes
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only lose by more

import pytest
from patterns import make_data

from reptile.data.prepared import PreparedData


@pytest.fixture(scope="session")
def data() -> PreparedData:
    return make_data()


@pytest.fixture
def root() -> Path:
    """The project's root folder."""
    return Path(__file__).parent.parent
