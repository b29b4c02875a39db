"""The grouped products, plain and fused with the activation and its gradient."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffmoe_core import grouped_gemm, grouped_gemm_wgrad
from ffmoe_core.cuda.tiles import Tiles, only
from tests import reference
from tests.core.checks import call_stage
from tests.support import (
    DTYPES,
    TOLERANCE,
    CupyKind,
    NumpyKind,
    assert_close,
    bits,
    numbers,
    rounded,
    router_dtype,
)

ACTIVATIONS = ("swiglu", "geglu", "relu_squared")
# One rounding to the dtype, and the errors of float32 (float64) arithmetic before it.
ONE_ROUNDING = {
    "float64": (0, 1e-13),
    "float32": (0, 2e-6),
    "float16": (1.02 * 2**-11, 2e-6),
    "bfloat16": (1.02 * 2**-8, 2e-6),
}


# Where a GPU has kernels of its own architecture, those that run on every one are tested too.
GPU_KERNELS = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cupy", "cupy-portable")]
ON_A_GPU = pytest.mark.parametrize("kind", GPU_KERNELS, indirect=True)
# And those for few rows, by the tests of products that have them.
WITH_FEW_ROWS = pytest.mark.parametrize(
    "kind", ["numpy", *GPU_KERNELS, pytest.param("cupy-rows", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture(scope="module", params=["numpy", *GPU_KERNELS])
def kind(request):
    if request.param == "numpy":
        yield NumpyKind()
    elif request.param == "cupy":
        yield CupyKind()
    elif request.param == "cupy-rows":
        with only({Tiles.ROWS}):
            yield CupyKind()
    else:
        os.environ["FFMOE_PORTABLE_KERNELS"] = "1"
        with only({Tiles.NARROW, Tiles.WIDE}):
            yield CupyKind()
        del os.environ["FFMOE_PORTABLE_KERNELS"]


def assert_rounded_once(got, want, dtype, what):
    """Every element is off by one rounding at most, as results computed in float32 are."""
    relative, slack = ONE_ROUNDING[dtype]
    error = np.abs(got - want) - relative * np.abs(want)
    assert np.isfinite(got).all(), what
    assert np.max(error, initial=0) <= slack * np.max(np.abs(want), initial=0), what


@st.composite
def groups(draw, max_experts=6, sizes=(0, 0, 1, 2, 7, 40, 130)):
    """expert_offsets, and the number of rows (some may belong to no group)."""
    counts = draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=max_experts))
    return np.cumsum([0, *counts]), sum(counts) + draw(st.sampled_from([0, 0, 3]))


widths = st.sampled_from([1, 2, 5, 8, 16, 17, 33, 64, 72, 130])


def whole_numbers(rng, *shape):
    """Products of these sum to what float32 holds exactly."""
    return rng.integers(-4, 5, shape).astype(float)


@WITH_FEW_ROWS
@given(
    group=groups(),
    inner=widths,
    columns=widths,
    transpose_b=st.booleans(),
    indexed=st.booleans(),
    given_out=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_grouped_gemm_is_exact(kind, group, inner, columns, transpose_b, indexed, given_out, dtype, seed):
    """Products of small whole numbers: no rounding but the result's, whatever the order of the sum."""
    offsets, rows = group
    rng = np.random.default_rng(seed)
    index = rng.integers(0, 9, rows) if indexed else None
    a = whole_numbers(rng, 9 if indexed else rows, inner)
    b = whole_numbers(rng, len(offsets) - 1, *((columns, inner) if transpose_b else (inner, columns)))
    out = kind.full((rows, columns), np.nan, dtype) if given_out else None
    got = grouped_gemm(
        kind.array(a, dtype),
        kind.array(b, dtype),
        kind.array(offsets, "int32"),
        row_index=None if index is None else kind.array(index, "int32"),
        transpose_b=transpose_b,
        out=out,
    )
    assert (got is out) if given_out else kind.is_kind(got)
    want = reference.grouped_gemm(a, b, offsets, index, transpose_b)
    assert numbers(kind, got).tolist() == rounded(want, dtype).tolist()


@given(
    group=groups(),
    left=widths,
    right=widths,
    left_indexed=st.booleans(),
    right_indexed=st.booleans(),
    out_dtype=st.sampled_from(["new", "that of a", "that of sums"]),
    accumulate=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_wgrad_is_exact(
    kind, group, left, right, left_indexed, right_indexed, out_dtype, accumulate, dtype, seed
):
    offsets, rows = group
    rng = np.random.default_rng(seed)
    a_index = rng.integers(0, 9, rows) if left_indexed else None
    b_index = rng.integers(0, 7, rows) if right_indexed else None
    a = whole_numbers(rng, 9 if left_indexed else rows, left)
    b = whole_numbers(rng, 7 if right_indexed else rows, right)
    given_out, accumulate = out_dtype != "new", accumulate and out_dtype != "new"
    out_dtype = router_dtype(dtype) if out_dtype == "that of sums" else dtype
    before = whole_numbers(rng, len(offsets) - 1, left, right)
    out = kind.array(before if accumulate else np.full_like(before, np.nan, dtype=float), out_dtype)
    got = grouped_gemm_wgrad(
        kind.array(a, dtype),
        kind.array(b, dtype),
        kind.array(offsets, "int32"),
        a_index=None if a_index is None else kind.array(a_index, "int32"),
        b_index=None if b_index is None else kind.array(b_index, "int32"),
        out=out if given_out else None,
        accumulate=accumulate,
    )
    assert (got is out) if given_out else kind.is_kind(got)
    want = reference.grouped_gemm_wgrad(a, b, offsets, a_index, b_index) + (before if accumulate else 0)
    assert numbers(kind, got).tolist() == rounded(want, out_dtype).tolist()


@WITH_FEW_ROWS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "columns"), [(96, 80), (77, 45)])
def test_products_round_once(kind, inner, columns, dtype):
    """Random numbers: float32 products and sums (never TF32 or 16 bits), rounded once."""
    rng = np.random.default_rng(0)
    offsets, rows = np.array([0, 50, 50, 53, 200]), 200
    a = rounded(rng.standard_normal((rows, inner)), dtype)
    b = rounded(rng.standard_normal((4, columns, inner)), dtype)
    c = rounded(rng.standard_normal((rows, columns)), dtype)
    device = {"a": kind.array(a, dtype), "b": kind.array(b, dtype), "c": kind.array(c, dtype)}
    where = kind.array(offsets, "int32")
    assert_rounded_once(
        numbers(kind, grouped_gemm(device["a"], device["b"], where)),
        reference.grouped_gemm(a, b, offsets),
        dtype,
        "a b^T",
    )
    assert_rounded_once(
        numbers(kind, grouped_gemm(device["c"], device["b"], where, transpose_b=False)),
        reference.grouped_gemm(c, b, offsets, transpose_b=False),
        dtype,
        "c b",
    )
    assert_rounded_once(
        numbers(kind, grouped_gemm_wgrad(device["c"], device["a"], where)),
        reference.grouped_gemm_wgrad(c, a, offsets),
        dtype,
        "c^T a",
    )


@WITH_FEW_ROWS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1500, 90, 70), (40, 2100, 70), (40, 70, 2100)])
def test_more_than_one_tile_in_every_direction(kind, rows, inner, columns, dtype):
    """Exact, as above, for sizes that any backend cuts into several pieces."""
    rng = np.random.default_rng(2)
    offsets = np.array([0, rows // 2, rows // 2 + 1, rows])
    index = rng.integers(0, 60, rows)
    x, w, g = (
        whole_numbers(rng, 60, inner),
        whole_numbers(rng, 3, columns, inner),
        whole_numbers(rng, rows, columns),
    )
    a, b, c = (kind.array(v, dtype) for v in (x, w, g))
    where, picks = kind.array(offsets, "int32"), kind.array(index, "int32")
    expert = np.repeat(np.arange(3), np.diff(offsets))
    product = numbers(kind, grouped_gemm(a, b, where, row_index=picks))
    back = numbers(kind, grouped_gemm(c, b, where, transpose_b=False))
    gradient = numbers(kind, grouped_gemm_wgrad(c, a, where, b_index=picks))
    for e in range(3):
        mine = expert == e
        assert (product[mine] == rounded(x[index[mine]] @ w[e].T, dtype)).all()
        assert (back[mine] == rounded(g[mine] @ w[e], dtype)).all()
        assert (gradient[e] == rounded(g[mine].T @ x[index[mine]], dtype)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "left", "right"), [(1500, 24, 40), (60, 600, 530)])
def test_wgrad_of_more_than_one_tile(kind, rows, left, right, dtype):
    rng = np.random.default_rng(3)
    a, b = whole_numbers(rng, rows, left), whole_numbers(rng, rows, right)
    offsets = np.array([0, rows - 9, rows - 9, rows])
    got = numbers(
        kind, grouped_gemm_wgrad(kind.array(a, dtype), kind.array(b, dtype), kind.array(offsets, "int32"))
    )
    for e in range(3):
        mine = slice(offsets[e], offsets[e + 1])
        assert (got[e] == rounded(a[mine].T @ b[mine], dtype)).all()


CHUNKS = 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "columns"), [(136, 72), (33, 5)])
def test_groups_in_chunks(kind, inner, columns, dtype):
    """Each call does its own chunk's rows, and leaves all others alone: NaN before. The gradient is of all chunks."""
    rng = np.random.default_rng(4)
    sizes = np.array([[5, 0, 130], [0, 0, 0], [1, 300, 7], [64, 2, 0]])  # by group and chunk
    offsets = np.cumsum([0, *sizes.flat])
    rows, chunk_of_row = (
        offsets[-1] + 4,
        np.append(np.repeat(np.arange(sizes.size) % CHUNKS, sizes.flat), [-1] * 4),
    )
    index = rng.integers(0, 60, rows)
    x, w = whole_numbers(rng, 60, inner), whole_numbers(rng, 4, 2 * columns, inner)
    g, w_down, weights = (
        whole_numbers(rng, 60, inner),
        whole_numbers(rng, 4, inner, columns),
        rng.random(rows),
    )
    where, whole = kind.array(offsets, "int32"), kind.array(offsets[::CHUNKS].copy(), "int32")
    picks, p = kind.array(index, "int32"), kind.array(weights, router_dtype(dtype))
    x_array, w_array, g_array, down = (kind.array(v, dtype) for v in (x, w, g, w_down))

    def products(where, *chunks):
        """Every product of rows, with outputs that are NaN before."""
        product, z, dz = (kind.full((rows, 2 * columns), np.nan, dtype) for _ in range(3))
        back, a, pa = (kind.full((rows, width), np.nan, dtype) for width in (inner, columns, columns))
        dp = kind.full((rows,), np.nan, router_dtype(dtype))
        z_given = kind.array(whole_numbers(np.random.default_rng(6), rows, 2 * columns), dtype)
        call_stage(kind, "grouped_gemm", x_array, w_array, where, picks, True, product, *chunks)
        call_stage(kind, "grouped_gemm", z_given, w_array, where, None, False, back, *chunks)
        call_stage(kind, "grouped_glu", x_array, w_array, where, picks, "swiglu", z, a, *chunks)
        call_stage(
            kind,
            "grouped_glu_backward",
            g_array,
            down,
            where,
            picks,
            p,
            z_given,
            "swiglu",
            dz,
            pa,
            dp,
            *chunks,
        )
        return [numbers(kind, out) for out in (product, back, z, a, dz, pa, dp)]

    wanted = products(whole)
    for chunk in range(CHUNKS):
        mine = chunk_of_row == chunk
        for got, want in zip(products(where, CHUNKS, chunk), wanted, strict=True):
            assert_close(got[mine], want[mine], dtype, "rows of the chunk")
            if got.ndim > 1:  # dp may be written anywhere: each chunk has one of its own
                assert np.isnan(got[~mine]).all()
    z_given = kind.array(whole_numbers(rng, rows, 2 * columns), dtype)
    gradients = [kind.full((4, 2 * columns, inner), np.nan, dtype) for _ in range(2)]
    call_stage(kind, "grouped_gemm_wgrad", z_given, x_array, whole, None, picks, gradients[0], False)
    call_stage(
        kind, "grouped_gemm_wgrad", z_given, x_array, where, None, picks, gradients[1], False, 1.0, CHUNKS
    )
    assert bits(kind, gradients[0]) == bits(kind, gradients[1])


@ON_A_GPU
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", ["float32", "same"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_wgrad_of_wide_tiles(kind, dtype, out_dtype, accumulate):
    """Deep and wide enough for the widest tiles of the tensor cores; exact, as above."""
    rng, rows, left, right = np.random.default_rng(5), 3300, 1024, 1544
    a, b = whole_numbers(rng, rows, left), whole_numbers(rng, rows, right)
    before = whole_numbers(rng, 3, left, right)
    offsets = np.array([0, 1500, 1500, 3290])
    out_dtype = dtype if out_dtype == "same" else out_dtype
    out = kind.array(before, out_dtype)
    arrays = [kind.array(a, dtype), kind.array(b, dtype), kind.array(offsets, "int32")]
    grouped_gemm_wgrad(*arrays, out=out, accumulate=accumulate)
    got = numbers(kind, out)
    for e in range(3):
        mine = slice(offsets[e], offsets[e + 1])
        want = a[mine].T @ b[mine] + (before[e] if accumulate else 0)
        assert (got[e] == rounded(want, out_dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("left", "right"), [(96, 80), (77, 45), (600, 530)])
def test_wgrad_into_sums(kind, left, right, dtype):
    """Tensor cores and others: not rounded to the inputs' dtype, and added to what was there."""
    rng = np.random.default_rng(4)
    offsets, rows = np.array([0, 130, 130, 200]), 210
    a, b = (rounded(rng.standard_normal((rows, n)), dtype) for n in (left, right))
    arrays = [kind.array(a, dtype), kind.array(b, dtype), kind.array(offsets, "int32")]
    sums = router_dtype(dtype)
    want = reference.grouped_gemm_wgrad(a, b, offsets)
    out = kind.full((3, left, right), np.nan, sums)
    assert grouped_gemm_wgrad(*arrays, out=out) is out
    assert_rounded_once(numbers(kind, out), want, sums, "sums")
    once = numbers(kind, out)
    assert grouped_gemm_wgrad(*arrays, out=out, accumulate=True) is out
    assert np.array_equal(numbers(kind, out), 2 * once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("left", "right"), [(96, 80), (77, 45), (600, 530)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_wgrad_scaled(kind, accumulate, left, right, dtype):
    """Scaled before it is rounded; what it is added to is not scaled."""
    rng = np.random.default_rng(5)
    offsets, rows, sums = np.array([0, 130, 130, 200]), 210, router_dtype(dtype)
    a, b = (rounded(rng.standard_normal((rows, n)), dtype) for n in (left, right))
    before = rounded(rng.standard_normal((3, left, right)), sums)
    out = kind.array(before, sums if accumulate else dtype)
    arrays = [kind.array(a, dtype), kind.array(b, dtype), kind.array(offsets, "int32")]
    call_stage(kind, "grouped_gemm_wgrad", *arrays, None, None, out, accumulate, 1 / 3)
    want = reference.grouped_gemm_wgrad(a, b, offsets) / 3 + (before if accumulate else 0)
    assert_close(numbers(kind, out), want, sums if accumulate else dtype, "scaled gradient")


# Groups around every size of a tile, some empty, and in all more tiles than a GPU has multiprocessors; 77 rows
# are nobody's.
MANY_TILES = np.cumsum(
    [0, 0, 1, 63, 64, 65, 127, 128, 129, 0, 191, 192, 193, 255, 256, 257, 320, 385, 511, 512, 513, 0, 1000]
)
MANY_ROWS = MANY_TILES[-1] + 77


@ON_A_GPU
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(("inner", "columns"), [(200, 600), (1032, 2312)])
def test_more_tiles_than_blocks(kind, inner, columns, indexed, dtype):
    """A block that takes several tiles, each as exact as the first; widths that fill no tile.

    Contractions as deep as the second keep Hopper's blocks in step with each other.
    """
    rng, experts = np.random.default_rng(6), len(MANY_TILES) - 1
    index = rng.integers(0, 500, MANY_ROWS) if indexed else None
    a = whole_numbers(rng, 500 if indexed else MANY_ROWS, inner)
    b, d = whole_numbers(rng, experts, columns, inner), whole_numbers(rng, MANY_ROWS, columns)
    arrays = [kind.array(v, dtype) for v in (a, b, d)]
    offsets = kind.array(MANY_TILES, "int32")
    picks = None if index is None else kind.array(index, "int32")
    out = kind.full((MANY_ROWS, columns), np.nan, dtype)
    grouped_gemm(arrays[0], arrays[1], offsets, row_index=picks, out=out)
    back = kind.full((MANY_ROWS, inner), np.nan, dtype)
    grouped_gemm(arrays[2], arrays[1], offsets, transpose_b=False, out=back)
    left, right = (
        kind.full((experts, *shape), np.nan, dtype) for shape in ((columns, inner), (inner, columns))
    )
    grouped_gemm_wgrad(arrays[2], arrays[0], offsets, b_index=picks, out=left)
    grouped_gemm_wgrad(arrays[0], arrays[2], offsets, a_index=picks, out=right)
    out, back, left, right = (numbers(kind, v) for v in (out, back, left, right))
    rows = a if index is None else a[index]
    for e in range(experts):
        mine = slice(MANY_TILES[e], MANY_TILES[e + 1])
        assert (out[mine] == rounded(rows[mine] @ b[e].T, dtype)).all()
        assert (back[mine] == rounded(d[mine] @ b[e], dtype)).all()
        gradient = rounded(d[mine].T @ rows[mine], dtype)
        assert (left[e] == gradient).all()
        assert (right[e] == gradient.T).all()
    assert (out[MANY_TILES[-1] :] == 0).all()
    assert (back[MANY_TILES[-1] :] == 0).all()


@ON_A_GPU
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("hidden", "width", "activation"), [*((136, 328, a) for a in ACTIVATIONS), (1032, 1800, "swiglu")]
)
def test_glu_of_more_tiles_than_blocks(kind, hidden, width, activation, dtype):
    rng, experts = np.random.default_rng(7), len(MANY_TILES) - 1
    x = rounded(rng.standard_normal((500, hidden)), dtype)
    w_up = rounded(rng.standard_normal((experts, 2 * width, hidden)) / hidden**0.5, dtype)
    w_down = rounded(rng.standard_normal((experts, hidden, width)) / hidden**0.5, dtype)
    index, weights = rng.integers(0, 500, MANY_ROWS), rounded(rng.random(MANY_ROWS), "float32")
    z = kind.full((MANY_ROWS, 2 * width), np.nan, dtype)
    a, pa = (kind.full((MANY_ROWS, width), np.nan, dtype) for _ in range(2))
    dz, dp = kind.full(z.shape, np.nan, dtype), kind.full((MANY_ROWS,), np.nan, "float32")
    tokens, offsets = kind.array(x, dtype), kind.array(MANY_TILES, "int32")
    picks = kind.array(index, "int32")
    call_stage(kind, "grouped_glu", tokens, kind.array(w_up, dtype), offsets, picks, activation, z, a)
    got_z = numbers(kind, z)
    want_z, want_a = reference.grouped_glu(x, w_up, MANY_TILES, index, activation)
    assert_rounded_once(got_z, want_z, dtype, "z")
    assert_rounded_once(numbers(kind, a), want_a, dtype, "a")
    call_stage(
        kind, "grouped_glu_backward", tokens, kind.array(w_down, dtype), offsets, picks,
        kind.array(weights, "float32"), z, activation, dz, pa, dp,
    )  # fmt: skip
    wanted = reference.grouped_glu_backward(x, w_down, MANY_TILES, index, weights, got_z, activation)
    assert_rounded_once(numbers(kind, dz), wanted[0], dtype, "dz")
    assert_rounded_once(numbers(kind, pa), wanted[1], dtype, "pa")
    assert_close(numbers(kind, dp), wanted[2], "float32", "dp", scale=1.0)


@st.composite
def glu_cases(draw):
    """Numbers of a GLU stage: groups, tokens, widths, activation, dtype."""
    offsets, rows = draw(groups(max_experts=4, sizes=(0, 1, 5, 33)))
    return (
        offsets,
        rows,
        draw(st.sampled_from([1, 7, 8, 40])),
        draw(st.sampled_from([1, 3, 8, 24, 65])),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.sampled_from(DTYPES)),
        np.random.default_rng(draw(st.integers(0, 99))),
    )


@WITH_FEW_ROWS
@given(case=glu_cases(), keep_z=st.booleans())
def test_glu(kind, case, keep_z):
    """Both outputs are rounded once: a comes from the unrounded z."""
    offsets, rows, hidden, width, activation, dtype, rng = case
    x = rounded(rng.standard_normal((6, hidden)), dtype)
    w_up = rounded(rng.standard_normal((len(offsets) - 1, 2 * width, hidden)) / hidden**0.5, dtype)
    index = rng.integers(0, 6, rows)
    z = kind.full((rows, 2 * width), np.nan, dtype) if keep_z else None
    a = kind.full((rows, width), np.nan, dtype)
    call_stage(
        kind,
        "grouped_glu",
        kind.array(x, dtype),
        kind.array(w_up, dtype),
        kind.array(offsets, "int32"),
        kind.array(index, "int32"),
        activation,
        z,
        a,
    )
    want_z, want_a = reference.grouped_glu(x, w_up, offsets, index, activation)
    assert_rounded_once(numbers(kind, a), want_a, dtype, "a")
    assert (numbers(kind, a)[offsets[-1] :] == 0).all()
    if keep_z:
        assert_rounded_once(numbers(kind, z), want_z, dtype, "z")
        assert (numbers(kind, z)[offsets[-1] :] == 0).all()


@given(case=glu_cases())
def test_glu_backward(kind, case):
    offsets, rows, hidden, width, activation, dtype, rng = case
    W = router_dtype(dtype)
    d_out = rounded(rng.standard_normal((6, hidden)), dtype)
    w_down = rounded(rng.standard_normal((len(offsets) - 1, hidden, width)) / hidden**0.5, dtype)
    index, weights = rng.integers(0, 6, rows), rounded(rng.random(rows), W)
    z = rounded(2 * rng.standard_normal((rows, 2 * width)), dtype)
    dz, pa = kind.full(z.shape, np.nan, dtype), kind.full((rows, width), np.nan, dtype)
    dp = kind.full((rows,), np.nan, W)
    call_stage(
        kind,
        "grouped_glu_backward",
        kind.array(d_out, dtype),
        kind.array(w_down, dtype),
        kind.array(offsets, "int32"),
        kind.array(index, "int32"),
        kind.array(weights, W),
        kind.array(z, dtype),
        activation,
        dz,
        pa,
        dp,
    )
    wanted = reference.grouped_glu_backward(d_out, w_down, offsets, index, weights, z, activation)
    for got, want, name in zip((dz, pa), wanted[:2], ("dz", "pa"), strict=True):
        assert_rounded_once(numbers(kind, got), want, dtype, name)
        assert (numbers(kind, got)[offsets[-1] :] == 0).all()
    assert_close(numbers(kind, dp), wanted[2], W, "dp", scale=1.0)
    assert (numbers(kind, dp)[offsets[-1] :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_far_out(kind, activation, dtype):
    """The activation and its slope where exp and tanh overflow or saturate."""
    gate = rounded(
        [-300, -90, -40, -20, -9, -6, -3, -1, -1e-3, 0, 1e-3, 0.5, 1, 3, 6, 9, 20, 40, 90, 150], dtype
    )
    I, W = len(gate), router_dtype(dtype)
    z = np.concatenate([gate, np.ones(I)])[None]
    dz, pa, dp = (
        kind.full((1, 2 * I), np.nan, dtype),
        kind.full((1, I), np.nan, dtype),
        kind.full((1,), np.nan, W),
    )
    call_stage(
        kind,
        "grouped_glu_backward",
        kind.array(np.ones((1, 1)), dtype),
        kind.array(np.ones((1, 1, I)), dtype),
        kind.array([0, 1], "int32"),
        kind.array([0], "int32"),
        kind.array([1.0], W),
        kind.array(z, dtype),
        activation,
        dz,
        pa,
        dp,
    )
    act, slope = reference.activate(activation, gate)
    got = numbers(kind, dz)[0]
    relative, _ = TOLERANCE[dtype]
    for name, result, want in (
        ("slope", got[:I], slope),
        ("act", got[I:], act),
        ("pa", numbers(kind, pa)[0], act),
    ):
        # element by element: each has its own size; near 0 the result's own granularity
        error = np.abs(result - want)
        assert (error <= relative * np.abs(want) + relative * 1e-2).all(), (name, gate[np.argmax(error)])
    assert_close(numbers(kind, dp), np.array([act.sum()]), W, "dp")


@WITH_FEW_ROWS
def test_nothing_to_do(kind):
    """No rows, no columns to sum, no groups with rows: shapes still hold, and results are zeros."""
    where = kind.array([0, 0, 0], "int32")
    b = kind.array(np.ones((2, 5, 3)), "float32")
    assert grouped_gemm(kind.array(np.ones((0, 3)), "float32"), b, where).shape == (0, 5)
    rows = grouped_gemm(kind.array(np.ones((4, 3)), "float32"), b, where)
    assert numbers(kind, rows).tolist() == np.zeros((4, 5)).tolist()
    empty = kind.array(np.ones((0, 3)), "float32")
    assert numbers(kind, grouped_gemm_wgrad(empty, empty, where)).tolist() == np.zeros((2, 3, 3)).tolist()
