"""A small selection of work for compute-sanitizer; also runs by itself.

    compute-sanitizer --tool memcheck python -m tests.cuda.sanitize [--portable]

Every allocation is its own (CuPy's memory pool is off), so that a read or write past the end of an array
lands outside of any allocation and is seen. With --portable Hopper's kernels are left out, of which racecheck and
initcheck see too little (sanitizer_limits.py).
"""

import argparse
import sys
from contextlib import nullcontext

import cupy

from ffmoe_core.cuda.tiles import HOPPER, only
from tests.cuda.layers import CASES, TOLERANCES, portable_kernels, run, run_on_cpu, worst_distance


def kinds(case, only_portable):
    """Whether to keep to the portable kernels, each way that the case is to be run."""
    if not case.has_kernels_of_its_own:
        return (False,)
    return (True,) if only_portable else (False, True)


@only(HOPPER)  # the newest kernels, small as the products are
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--portable", action="store_true", help="without Hopper's kernels")
    arguments = parser.parse_args()
    cupy.cuda.set_allocator(None)
    wrong = 0
    for case in CASES:
        expected = run_on_cpu(case)
        for portable in kinds(case, arguments.portable):
            with portable_kernels() if portable else nullcontext():
                distance = worst_distance(run(case, cupy.asarray, cupy.asnumpy), expected)
            ok = distance <= TOLERANCES[case.dtype]  # False for NaN
            wrong += not ok
            label = case.name + (", portable kernels" if portable else "")
            print(f"{'ok' if ok else 'WRONG':5}  {label:56} {distance:.1e} from the CPU's", flush=True)
    cupy.cuda.Device().synchronize()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
