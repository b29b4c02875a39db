"""``python -m tests.emulator.products SOURCES SCHEDULES CASE``: Hopper's products, one or the router's, under several
schedules.

Each must give the reference's numbers, and all of them the same bits. SOURCES are in a folder that keeps what is
compiled.
"""

import sys

import numpy as np

from ffmoe_core.cuda.tiles import TURNS, Tiles, only
from tests import reference
from tests.core.checks import call_stage
from tests.core.test_grouped_gemm import assert_rounded_once, whole_numbers
from tests.emulator import emulator
from tests.support import NumpyKind, bits, numbers, rounded

CASES = {}
KIND = NumpyKind()
DTYPE = "bfloat16"
# Rows of each expert: none, fewer than a tile's half, a tile and a bit, several tiles; 37 rows are nobody's.
SIZES = (130, 0, 5, 300, 513, 65)
OFFSETS = np.cumsum([0, *SIZES])
ROWS, TOKENS, EXPERTS = OFFSETS[-1] + 37, 200, len(SIZES)
# Contraction and columns: neither fills its last tile. The second is deep enough for blocks to keep pace.
WIDTHS = [(136, 520), (1096, 264)]


def case(all_widths=WIDTHS, **options):
    """A case by its name: the product for all widths."""

    def add(function):
        label = ", ".join([function.__name__, *(f"{name}={value}" for name, value in options.items())])
        CASES[label] = lambda: [out for widths in all_widths for out in function(*widths, **options)]
        return function

    return add


class Arrays:
    """Inputs of a product, and outputs that start as NaN."""

    def __init__(self, gather):
        self.rng = np.random.default_rng(0)
        self.offsets = KIND.array(OFFSETS, "int32")
        self.index = self.rng.integers(0, TOKENS, ROWS) if gather else np.arange(ROWS)
        self.picks = KIND.array(self.index, "int32") if gather else None

    def whole(self, *shape):
        values = whole_numbers(self.rng, *shape)
        return values, KIND.array(values, DTYPE)

    def normal(self, *shape, scale=1.0):
        values = rounded(self.rng.standard_normal(shape) * scale, DTYPE)
        return values, KIND.array(values, DTYPE)

    def rows(self, width, gather):
        return (TOKENS if gather else ROWS, width)

    def out(self, *shape, dtype=DTYPE):
        return KIND.full(shape, np.nan, dtype)


@case(gather=True, transpose_b=True)
@case(gather=False, transpose_b=True)
@case(gather=True, transpose_b=False)
@case(gather=False, transpose_b=False)
def grouped_gemm(inner, columns, gather, transpose_b):
    return [
        out
        for tiles in (Tiles.CLUSTER, Tiles.PACED)
        for out in product(tiles, inner, columns, gather, transpose_b)
    ]


# One step and many, fewer columns than a tile has, tiles that are full and that are not.
@case([(40, 200), (136, 520), (392, 96), (1096, 192)], transpose_b=True)
@case([(40, 200), (136, 520), (392, 96), (1096, 192)], transpose_b=False)
def grouped_gemm_in_turns(inner, columns, transpose_b):
    return [out for tiles in sorted(TURNS) for out in product(tiles, inner, columns, False, transpose_b)]


def product(tiles, inner, columns, gather, transpose_b):
    new = Arrays(gather)
    a, a_array = new.whole(*new.rows(inner, gather))
    b, b_array = new.whole(EXPERTS, *((columns, inner) if transpose_b else (inner, columns)))
    out = new.out(ROWS, columns)
    with only({tiles}):
        call_stage(KIND, "grouped_gemm", a_array, b_array, new.offsets, new.picks, transpose_b, out)
    want = rounded(reference.grouped_gemm(a, b, OFFSETS, new.index, transpose_b), DTYPE)
    assert numbers(KIND, out).tolist() == want.tolist()
    return [out]


@case(gather="none", accumulate=False)
@case(gather="left", accumulate=False)
@case(gather="right", accumulate=False)
@case(gather="right", accumulate=True)
def grouped_gemm_wgrad(left, right, gather, accumulate):
    new = Arrays(gather != "none")
    a, a_array = new.whole(*new.rows(left, gather == "left"))
    b, b_array = new.whole(*new.rows(right, gather == "right"))
    before, out = new.whole(EXPERTS, left, right)
    if accumulate:
        out = KIND.array(before, "float32")
    picks = {"none": (None, None), "left": (new.picks, None), "right": (None, new.picks)}[gather]
    call_stage(KIND, "grouped_gemm_wgrad", a_array, b_array, new.offsets, *picks, out, accumulate, 0.5)
    index = {"none": (None, None), "left": (new.index, None), "right": (None, new.index)}[gather]
    want = reference.grouped_gemm_wgrad(a, b, OFFSETS, *index) / 2 + (before if accumulate else 0)
    assert numbers(KIND, out).tolist() == rounded(want, "float32" if accumulate else DTYPE).tolist()
    return [out]


@case([(392, 264)])
def tiles_without_rows(left, right):
    """More of them than a cluster's numbers of tiles have room for, before, between and behind tiles with rows."""
    sizes = [0] * 60
    sizes[3], sizes[31], sizes[32] = 1, 200, 65
    new, offsets = Arrays(gather=True), np.cumsum([0, *sizes])
    index = new.rng.integers(0, TOKENS, offsets[-1])
    a, a_array = new.whole(offsets[-1], left)
    b, b_array = new.whole(TOKENS, right)
    out = new.out(len(sizes), left, right)
    call_stage(
        KIND, "grouped_gemm_wgrad", a_array, b_array, KIND.array(offsets, "int32"), None,
        KIND.array(index, "int32"), out, False, 1.0,
    )  # fmt: skip
    want = rounded(reference.grouped_gemm_wgrad(a, b, offsets, None, index), DTYPE)
    assert numbers(KIND, out).tolist() == want.tolist()
    return [out]


@case(gather=True)
@case(gather=False)
def grouped_glu(hidden, width, gather):
    new = Arrays(gather)
    x, x_array = new.normal(*new.rows(hidden, gather))
    w_up, w_array = new.normal(EXPERTS, 2 * width, hidden, scale=hidden**-0.5)
    z, a = new.out(ROWS, 2 * width), new.out(ROWS, width)
    call_stage(KIND, "grouped_glu", x_array, w_array, new.offsets, new.picks, "swiglu", z, a)
    wanted = reference.grouped_glu(x, w_up, OFFSETS, new.index, "swiglu")
    for got, want, name in zip((z, a), wanted, ("z", "a"), strict=True):
        assert_rounded_once(numbers(KIND, got), want, DTYPE, name)
    return [z, a]


@case(gather=True)
@case(gather=False)
def grouped_glu_backward(hidden, width, gather):
    new = Arrays(gather)
    d_out, d_array = new.normal(*new.rows(hidden, gather))
    w_down, w_array = new.normal(EXPERTS, hidden, width, scale=hidden**-0.5)
    z, z_array = new.normal(ROWS, 2 * width)
    weights = rounded(new.rng.random(ROWS), "float32")
    dz, pa, dp = new.out(*z.shape), new.out(ROWS, width), new.out(ROWS, dtype="float32")
    call_stage(
        KIND, "grouped_glu_backward", d_array, w_array, new.offsets, new.picks,
        KIND.array(weights, "float32"), z_array, "swiglu", dz, pa, dp,
    )  # fmt: skip
    wanted = reference.grouped_glu_backward(d_out, w_down, OFFSETS, new.index, weights, z, "swiglu")
    for got, want, name in zip((dz, pa), wanted[:2], ("dz", "pa"), strict=True):
        assert_rounded_once(numbers(KIND, got), want, DTYPE, name)
    return [dz, pa, dp]


@case([(40, 192)])
def few_turns(inner, columns):
    """A tile, three, or none: of two clusters one has fewer, or nothing to do but to clear rows."""
    outputs = []
    for sizes in ((0, 0), (0, 1), (1, 300)):
        new, offsets = Arrays(gather=False), np.cumsum([0, *sizes])
        rows = offsets[-1] + 3
        a, a_array = new.whole(rows, inner)
        b, b_array = new.whole(len(sizes), columns, inner)
        outputs.append(new.out(rows, columns))
        with only({Tiles.TURNS}):
            call_stage(
                KIND, "grouped_gemm", a_array, b_array, KIND.array(offsets, "int32"), None, True, outputs[-1]
            )
        want = rounded(reference.grouped_gemm(a, b, offsets, np.arange(rows), True), DTYPE)
        assert numbers(KIND, outputs[-1]).tolist() == want.tolist()
    return outputs


@case([(136, 264)], gather=True)
@case([(136, 264)], gather=False)
def in_chunks(inner, columns, gather):
    """The groups as two chunks of half as many: each call does its own, and the rows behind the last stay."""
    new = Arrays(gather)
    a, a_array = new.whole(*new.rows(inner, gather))
    b, b_array = new.whole(EXPERTS // 2, columns, inner)
    out = new.out(ROWS, columns)
    for chunk in range(2):
        with only({Tiles.CLUSTER if gather else Tiles.TURNS}):
            call_stage(KIND, "grouped_gemm", a_array, b_array, new.offsets, new.picks, True, out, 2, chunk)
    got, last = numbers(KIND, out), OFFSETS[-1]
    want = rounded(reference.grouped_gemm(a, b, OFFSETS[::2], new.index, True), DTYPE)
    assert got[:last].tolist() == want[:last].tolist()
    assert np.isnan(got[last:]).all()
    return [out]


@case([(40, 24), (136, 200), (1096, 264)], gather=True)
@case([(40, 24), (136, 200), (1096, 264)], gather=False)
def few_rows(inner, columns, gather):
    """None, one, a tile and a bit; nobody's are more than a tile, and those before the first group's are left alone."""
    before = 9
    offsets = np.cumsum([before, 0, 1, 9, 0, 8, 3])
    new, rows, groups = Arrays(gather), offsets[-1] + 11, len(offsets) - 1
    index = new.rng.integers(0, TOKENS, rows) if gather else np.arange(rows)
    given = [KIND.array(offsets, "int32"), KIND.array(index, "int32") if gather else None]
    a, a_array = new.whole(TOKENS if gather else rows, inner)
    b, b_array = new.whole(groups, columns, inner)
    w_up, w_array = new.normal(groups, 2 * columns, inner, scale=inner**-0.5)
    out, z, activated = new.out(rows, columns), new.out(rows, 2 * columns), new.out(rows, columns)
    with only({Tiles.ROWS}):
        call_stage(KIND, "grouped_gemm", a_array, b_array, *given, True, out)
        call_stage(KIND, "grouped_glu", a_array, w_array, *given, "geglu", z, activated)
    want = rounded(reference.grouped_gemm(a, b, offsets, index, True), DTYPE)
    assert numbers(KIND, out)[before:].tolist() == want[before:].tolist()
    wanted = reference.grouped_glu(a, w_up, offsets, index, "geglu")
    for got, want, name in zip((z, activated), wanted, ("z", "a"), strict=True):
        assert_rounded_once(numbers(KIND, got)[before:], want[before:], DTYPE, name)
    assert all(np.isnan(numbers(KIND, array)[:before]).all() for array in (out, z, activated))
    return [out, z, activated]


# Fewer tokens than 8192 are other kernels' affair.
@case([(40, 136, 5), (40, 60, 5)])
def router(hidden, experts, top_k):
    new, tokens = Arrays(gather=True), 8257
    x, x_array = new.normal(tokens, hidden)
    gate, gate_array = new.normal(experts, hidden)
    rows, rows_array = new.normal(2 * tokens, hidden)
    d_logits = rounded(new.rng.standard_normal((tokens, experts)), "float32")
    token_rows = new.rng.integers(-1, len(rows), (tokens, top_k))
    logits, dx, d_gate = new.out(tokens, experts, dtype="float32"), new.out(*x.shape), new.out(*gate.shape)
    call_stage(KIND, "gate_logits", x_array, gate_array, logits)
    added = (rows_array, KIND.array(token_rows, "int32"))
    call_stage(
        KIND, "gate_backward", KIND.array(d_logits, "float32"), x_array, gate_array, *added, dx, d_gate
    )
    chosen = np.argsort(new.rng.random((tokens, experts)), axis=1)[:, :top_k]
    d_chosen, d_gate_chosen = np.take_along_axis(d_logits, chosen, 1), new.out(*gate.shape)
    dx_chosen = new.out(*x.shape)
    call_stage(
        KIND, "gate_backward", KIND.array(d_chosen, "float32"), x_array, gate_array, *added, dx_chosen,
        d_gate_chosen, KIND.array(chosen, "int32"),
    )  # fmt: skip
    want = x @ gate.T
    assert np.linalg.norm(numbers(KIND, logits) - want) < 1e-6 * np.linalg.norm(want)
    gathered = np.where((token_rows >= 0)[:, :, None], rows[token_rows], 0).sum(axis=1)
    assert_rounded_once(numbers(KIND, dx), d_logits @ gate + gathered, DTYPE, "dx")
    assert_rounded_once(numbers(KIND, d_gate), d_logits.T @ x, DTYPE, "d_gate")
    only_chosen = np.zeros(d_logits.shape)
    np.put_along_axis(only_chosen, chosen, d_chosen, axis=1)
    assert_rounded_once(numbers(KIND, dx_chosen), only_chosen @ gate + gathered, DTYPE, "dx of the chosen")
    assert_rounded_once(numbers(KIND, d_gate_chosen), only_chosen.T @ x, DTYPE, "d_gate of the chosen")
    return [logits, dx, d_gate, dx_chosen, d_gate_chosen]


def main(sources, schedules, name):
    emulator.install(sources)
    first = None
    for seed in range(int(schedules)):
        emulator.set_seed(seed)
        outputs = [bits(KIND, output) for output in CASES[name]()]
        assert first is None or outputs == first, f"schedule {seed} gives other bits"
        first = outputs


if __name__ == "__main__":
    main(*sys.argv[1:])
