"""More than 2^31 elements: indices of elements and bytes are 64 bit."""

import numpy as np
import pytest

from ffmoe_core import combine, grouped_gemm, grouped_gemm_wgrad, make_plan, permute
from tests.support import numbers

# one after the other where tests run side by side: there is not memory for all of them
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("large arrays")]

K, WIDTH = 64, 65536
T = 2**31 // (K * WIDTH) + 1
ROWS = T * K  # ROWS * WIDTH is just above 2^31
NEEDED = 12 * 2**30  # bytes: two arrays of that many 16-bit elements, and room to breathe


@pytest.fixture(autouse=True)
def _room(kind):
    """Skips where there is not enough free memory, saying so."""
    if kind.name == "cupy":
        kind.module.get_default_memory_pool().free_all_blocks()
        free = kind.module.cuda.Device().mem_info[0]
    else:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of memory, {free / 2**30:.1f} are free")


@pytest.fixture
def plan(kind):
    """Every token goes to all K experts: row e*T + t is token t."""
    idx = np.tile(np.arange(K)[::-1], (T, 1))
    return make_plan(kind.array(idx, "int32"), kind.array(np.full(idx.shape, 0.5), "float32"), K)


def test_permute_and_combine(kind, plan):
    """Rows on both sides of the 2^31st element are the right ones, and sums over all of them are right."""
    assert ROWS * WIDTH > 2**31
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 9, (T, WIDTH)).astype(np.float16)
    rows = permute(kind.module.asarray(x), plan)
    assert rows.shape == (ROWS, WIDTH)
    for row in (0, T - 1, T, ROWS // 2, ROWS - T, ROWS - 2, ROWS - 1):
        assert (kind.host(rows[row]) == x[row % T]).all(), row
    # a mark in the last row, far past 2^31, that only its token may see
    rows[ROWS - 1, WIDTH - 3 :] = 1000.0
    out = kind.host(combine(rows, plan))
    want = x * np.float16(K / 2)
    want[T - 1, WIDTH - 3 :] = 500.0 + x[T - 1, WIDTH - 3 :] * np.float32((K - 1) / 2)
    assert (out == want).all()


@pytest.mark.gpu
def test_grouped_gemm_with_a_large_output(cupy_kind):
    """out [R, N] has more than 2^31 elements, on the tile path and on the path of odd widths."""
    for columns in (WIDTH, WIDTH + 1):
        rng = np.random.default_rng(1)
        a = rng.integers(-2, 3, (ROWS, 8)).astype(float)
        b = rng.integers(-2, 3, (2, columns, 8)).astype(float)
        offsets = np.array([0, 5, ROWS])
        out = grouped_gemm(
            cupy_kind.array(a, "float16"), cupy_kind.array(b, "float16"), cupy_kind.array(offsets, "int32")
        )
        assert out.size > 2**31
        for row in (0, 4, 5, ROWS // 2, ROWS - 1):
            assert (numbers(cupy_kind, out[row]) == b[int(row >= 5)] @ a[row]).all(), row
        del out


@pytest.mark.gpu
def test_grouped_gemm_of_a_large_input(cupy_kind):
    """a [rows, K] has more than 2^31 elements: read by rows, by index, and contracted along the rows."""
    cp = cupy_kind.module
    a = cp.zeros((ROWS, WIDTH), cp.float16)
    a[ROWS - 1] = 1
    a[ROWS - 2, :100] = 2
    offsets = cupy_kind.array([0, 7, ROWS], "int32")
    b = cp.ones((2, 8, WIDTH), cp.float16) / 256
    out = numbers(cupy_kind, grouped_gemm(a, b, offsets))
    assert (out[ROWS - 1] == WIDTH / 256).all()
    assert (out[ROWS - 2] == 200 / 256).all()
    assert (out[: ROWS - 2] == 0).all()
    index = cupy_kind.array([ROWS - 1, 0, ROWS - 2], "int32")
    out = numbers(cupy_kind, grouped_gemm(a, b, cupy_kind.array([0, 1, 3], "int32"), row_index=index))
    assert out[:, 0].tolist() == [WIDTH / 256, 0, 200 / 256]
    out = numbers(cupy_kind, grouped_gemm_wgrad(a, cp.ones((ROWS, 8), cp.float16), offsets))
    assert (out[0] == 0).all()
    assert (out[1, :100] == 3).all()
    assert (out[1, 100:] == 1).all()


@pytest.mark.gpu
def test_weights_and_their_gradients_past_two_billion(cupy_kind):
    """[E, M, N] with more than 2^31 elements, where the last expert's matrix starts beyond them."""
    cp = cupy_kind.module
    experts, wide, narrow = 257, 8192, 1024
    offsets = cp.zeros(experts + 1, cp.int32)
    offsets[-1] = 2
    a, b = cp.ones((2, wide), cp.float16), cp.full((2, narrow), 3, cp.float16)
    gradient = grouped_gemm_wgrad(a, b, offsets)
    assert gradient.size > 2**31
    assert bool((gradient[-1] == 6).all())
    assert not bool(gradient[:-1].any())
    product = grouped_gemm(a, gradient.reshape(experts, narrow, wide), offsets)
    assert bool((product == 6 * wide).all())
