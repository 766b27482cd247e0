"""What tests of the native engine share."""

import pytest

from reptile.learn.engines.native import BuildError, build


@pytest.fixture(scope="session")
def kernel() -> None:
    """The kernel, built once; only where there is no compiler is there nothing to test."""
    try:
        build.load_kernel()
    except BuildError as error:
        if "no C++ compiler" not in str(error):
            raise
        pytest.skip(str(error))
