"""The sources, compiled once for all tests, and room for as many processes as there are processors."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.emulator import emulator


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The kernels as they are, in a folder that keeps what is compiled."""
    return emulator.prepare(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def pool():
    pool = ThreadPoolExecutor(os.cpu_count())
    yield pool
    pool.shutdown(cancel_futures=True)
