"""A small selection of work for compute-sanitizer; also runs by itself.

    compute-sanitizer --tool memcheck python -m tests.cuda.sanitize

Every allocation is its own (CuPy's memory pool is off), so that a read or write past the end of an array
lands outside of any allocation and is seen.
"""

import sys
from contextlib import nullcontext

import cupy

from ffmoe_core.cuda.tiles import HOPPER, only
from tests.cuda.layers import CASES, TOLERANCES, portable_kernels, run, run_on_cpu, worst_distance


@only(HOPPER)  # the newest kernels, small as the products are
def main() -> int:
    cupy.cuda.set_allocator(None)
    wrong = 0
    for case in CASES:
        expected = run_on_cpu(case)
        for portable in (False, True) if case.has_kernels_of_its_own else (False,):
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
