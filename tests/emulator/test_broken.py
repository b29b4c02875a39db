"""The emulated GPU sees what it is there to see: kernels that are broken on purpose."""

import pytest

from tests.emulator import emulator
from tests.emulator.processes import run

SCHEDULES = 4

# Which file, what is taken away there, or changed; a case that must see it; what is said then.
BROKEN = {
    "threads that nobody waits for": (
        "grouped_gemm_sm90.cu",
        "        if (!GATHER && threadIdx.x > 0) return;\n",
        "",
        ("products", "grouped_gemm, gather=False, transpose_b=True"),
        "nothing happens any more",
    ),
    "a stage that is let go while it is multiplied": (
        "grouped_gemm_sm90.cu",
        "        wait_for_products<1>();\n",
        "",
        ("products", "grouped_glu, gather=True"),
        "AssertionError",
    ),
    "a buffer that is written to while it is stored": (
        "grouped_gemm_sm90.cu",
        "                wait_for_reads<1>();\n",
        "",
        ("products", "grouped_glu_backward, gather=True"),
        "AssertionError",
    ),
    "a last stage that is overwritten while the other warpgroup reads it": (
        "grouped_gemm_sm90.cu",
        "        meet_multipliers(rows);\n",
        "",
        ("products", "grouped_gemm_wgrad, gather=left, accumulate=False"),
        "AssertionError",
    ),
    "row numbers that are read before they have come": (
        "grouped_gemm_sm90.cu",
        "        wait_for_copies<STAGES - 1>();\n",
        "        wait_for_copies<STAGES>();\n",
        ("products", "grouped_gemm_wgrad, gather=left, accumulate=False"),
        "AssertionError",
    ),
    "numbers of tiles that are overwritten before they are read": (
        "common/tile_queue.cuh",
        "    static constexpr int SLOTS = 16;\n",
        "    static constexpr int SLOTS = 4;\n",
        ("products", "tiles_without_rows"),
        (
            "AssertionError",
            "nothing happens any more",
            "more arrivals than it waits for",
        ),  # as the schedule has it
    ),
    "tiles that are not told": (
        "grouped_gemm_sm90.cu",
        "            shared().tile[ring.stage] = tile;\n",
        "            if (tile % 2 == 0) shared().tile[ring.stage] = tile;\n",
        ("products", "tiles_without_rows"),
        ("AssertionError", "nothing happens any more", "more arrivals than it waits for"),
    ),
    "an end that only one of two warpgroups sees": (
        "grouped_gemm_turns_sm90.cu",
        "        drawer.ask();\n        proceed();\n    };\n",
        "    };\n",
        ("products", "grouped_gemm_in_turns, transpose_b=True"),
        "nothing happens any more",
    ),
    "one arrival too many": (
        "common/ring.cuh",
        "    if (lane() < CLUSTER) arrive(empty, lane());\n",
        "    if (lane() < CLUSTER) arrive(empty, lane());\n    if (lane() == 0) arrive(empty, 0);\n",
        ("products", "grouped_gemm, gather=False, transpose_b=True"),
        "more arrivals than it waits for",
    ),
    "turns that are not waited for": (
        "grouped_gemm_turns_sm90.cu",
        "            if (n > 0) wait_for_turn();\n",
        "",
        ("products", "grouped_gemm_in_turns, transpose_b=True"),
        (
            "AssertionError",
            "more arrivals than it waits for",
            "nothing happens any more",
        ),  # as the schedule has it
    ),
    "a turn that is given before its stages are waited for": (
        "grouped_gemm_turns_sm90.cu",
        "            if (n > 0) wait_for_turn();\n",
        "            if (n > 0) wait_for_turn();\n            give();\n",
        ("products", "grouped_gemm_in_turns, transpose_b=False"),
        "nothing happens any more",
    ),
    "a piece that is written over one on its way": (
        "grouped_gemm_turns_sm90.cu",
        "        wait_for_reads<BUFFERS - 1>();\n",
        "        wait_for_reads<BUFFERS>();\n",
        ("products", "grouped_gemm_in_turns, transpose_b=True"),
        "AssertionError",
    ),
    "a turn's last stage that is let go while it is multiplied": (
        "grouped_gemm_turns_sm90.cu",
        "                wait_for_products<0>();\n",
        "",
        ("products", "grouped_gemm_in_turns, transpose_b=False"),
        "AssertionError",
    ),
    "a stage that is read before it has come": (
        "grouped_gemm_sm80.cu",
        "    wait_for_copies<STAGES - 2>();\n    __syncthreads();\n",
        "    wait_for_copies<STAGES - 1>();\n    __syncthreads();\n",
        ("layers", "bfloat16", "portable"),
        "AssertionError",
    ),
    "a stage that is overwritten while others read it": (
        "dense_gemm.cu",
        "        __syncthreads();  // and every warp has left the stage before this one: the next to be filled\n",
        "        __syncwarp();\n",
        ("layers", "bfloat16, rows past one tile", "own"),
        "AssertionError",
    ),
    "ranks that are read before they are known": (
        "common/placement.cuh",
        "        __syncthreads();\n#pragma unroll\n        for (int i = 0; i < SLOTS_PER_LANE; i++) {\n"
        "            if (experts[i] >= 0) places",
        "#pragma unroll\n        for (int i = 0; i < SLOTS_PER_LANE; i++) {\n"
        "            if (experts[i] >= 0) places",
        ("layers", "bfloat16, rows past one tile", "own"),
        None,  # rows out of bounds: it is killed for that
    ),
}


@pytest.fixture(scope="module")
def outcomes(sources, pool):
    def outcome(what, change, case):
        broken = emulator.break_sources(sources.with_name(what), *change)
        return run(case[0], broken, SCHEDULES, *case[1:])

    return {what: pool.submit(outcome, what, change, case) for what, (*change, case, _) in BROKEN.items()}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_seen(outcomes, what):
    output, code = outcomes[what].result()
    seen = BROKEN[what][-1]
    if seen is None:
        assert code < 0, output
    else:
        assert code > 0
        assert any(words in output for words in ([seen] if isinstance(seen, str) else seen)), output
