"""Hopper's products on an emulated GPU: right under every schedule, and none of them hangs."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulator import cases

# 50 is what a change to these kernels should stand: FFMOE_SCHEDULES=50
SCHEDULES = int(os.environ.get("FFMOE_SCHEDULES", "2"))
TIMEOUT = 300 + 10 * SCHEDULES

# What is taken away, or changed; a case that must see it; what is said then.
BROKEN = {
    "threads that nobody waits for": (
        "        if (!GATHER && threadIdx.x > 0) return;\n",
        "",
        "grouped_gemm, gather=False, transpose_b=True",
        "nothing happens any more",
    ),
    "a stage that is let go while it is multiplied": (
        "        wait_for_products<1>();\n",
        "",
        "grouped_glu, gather=True",
        "AssertionError",
    ),
    "a buffer that is written to while it is stored": (
        "                wait_for_reads<1>();\n",
        "",
        "grouped_glu_backward, gather=True",
        "AssertionError",
    ),
    "a last stage that is overwritten while the other warpgroup reads it": (
        "        meet_multipliers(rows);\n",
        "",
        "grouped_gemm_wgrad, gather=left, accumulate=False",
        "AssertionError",
    ),
    "row numbers that are read before they have come": (
        "        wait_for_copies<STAGES - 1>();\n",
        "        wait_for_copies<STAGES>();\n",
        "grouped_gemm_wgrad, gather=left, accumulate=False",
        "AssertionError",
    ),
    "one arrival too many": (
        "    if (lane() < CLUSTER) arrive(empty, lane());\n",
        "    if (lane() < CLUSTER) arrive(empty, lane());\n    if (lane() == 0) arrive(empty, 0);\n",
        "grouped_gemm, gather=False, transpose_b=True",
        "more arrivals than it waits for",
    ),
}


def run(folder, *arguments):
    """What a case printed, and its exit status."""
    command = [sys.executable, "-m", "tests.emulator.cases", folder, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    return ended.stdout + ended.stderr, ended.returncode


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of every case; as many at a time as there are processors."""
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {
        name: pool.submit(run, tmp_path_factory.mktemp("compiled"), str(SCHEDULES), name)
        for name in cases.CASES
    }
    pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.CASES)
def test_right_under_every_schedule(outcomes, case):
    output, code = outcomes[case].result()
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_seen(tmp_path, what):
    old, new, case, complaint = BROKEN[what]
    output, code = run(tmp_path, "4", case, old, new)
    assert code != 0
    assert complaint in output, output
