"""``python -m tests.emulator.layers SOURCES SCHEDULES CASE KERNELS``: one layer, forward and backward.

Every schedule must give the CPU backend's numbers, and all of them the same bits. SOURCES are in a folder that keeps
what is compiled; KERNELS: "own", which are Hopper's wherever it has any, or "portable".
"""

import sys

import numpy as np

from ffmoe_core.cuda.tiles import HOPPER, only
from tests.cuda.layers import CASES, TOLERANCES, portable_kernels, run, run_on_cpu, worst_distance
from tests.emulator import emulator

BY_NAME = {case.name: case for case in CASES}


def main(sources, schedules, name, kernels):
    case = BY_NAME[name]
    expected = run_on_cpu(case)
    emulator.install(sources)
    first = None
    for seed in range(int(schedules)):
        emulator.set_seed(seed)
        with portable_kernels() if kernels == "portable" else only(HOPPER):
            got = run(case, lambda values: values, np.asarray)
        distance = worst_distance(got, expected)
        assert distance <= TOLERANCES[case.dtype], f"schedule {seed}: {distance:.1e} from the CPU's"
        outputs = [array.tobytes() for array in got]
        assert first is None or outputs == first, f"schedule {seed} gives other bits"
        first = outputs


if __name__ == "__main__":
    main(*sys.argv[1:])
