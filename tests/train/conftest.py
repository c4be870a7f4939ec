"""Every test of training runs on the backend of the machine; a run that nothing happened to is made once."""

import pytest
from tiny_run import BACKEND, run

from unsloth_core import backend


@pytest.fixture(autouse=True)
def _backend():
    with backend.using(BACKEND):
        yield


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run that nothing happened to: what it returned, and its folder. Nobody writes there."""
    output = tmp_path_factory.mktemp("whole")
    with backend.using(BACKEND):
        return run(output), output
