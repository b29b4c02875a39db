"""The router on an emulated GPU: what it computes, under every schedule."""

import pytest

from tests.emulator.processes import SCHEDULES, run
from tests.emulator.routers import CASES


@pytest.fixture(scope="module")
def outcomes(sources, pool):
    return {case: pool.submit(run, "routers", sources, SCHEDULES, case) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_right_under_every_schedule(outcomes, case):
    output, code = outcomes[case].result()
    assert code == 0, output
