"""Every test here runs on the best device, and fails if it forks: `bash scripts/test.sh tests/device`."""

import pytest

from tests.helpers.device import FORKS


@pytest.fixture(autouse=True)
def no_forks():
    """No process is forked after CUDA was asked."""
    FORKS.clear()
    yield
    assert not FORKS, "a fork after CUDA was asked, at\n" + FORKS[0]
