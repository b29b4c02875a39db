"""Whole layers on an emulated GPU, forward and backward: every kernel between them, right under every schedule."""

import pytest

from tests.cuda.layers import CASES
from tests.emulator.processes import SCHEDULES, run

# On a machine this small blocks take several tiles of any layer.
TOO_LARGE = {"bfloat16, several tiles a block"}
RUNS = [
    (case.name, kernels)
    for case in CASES
    if case.name not in TOO_LARGE
    for kernels in (("own", "portable") if case.has_kernels_of_its_own else ("own",))
]


@pytest.fixture(scope="module")
def outcomes(sources, pool):
    return {arguments: pool.submit(run, "layers", sources, SCHEDULES, *arguments) for arguments in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kernels"), RUNS)
def test_right_under_every_schedule(outcomes, case, kernels):
    output, code = outcomes[case, kernels].result()
    assert code == 0, output
