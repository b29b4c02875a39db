"""The dense GLU block: forward and every gradient against the reference, and what it refuses."""

import numpy as np
import pytest

from ffmoe_core import errors, glu_down, glu_down_backward, glu_up, glu_up_backward
from ffmoe_core.arrays import Space, as_array
from ffmoe_core.backend import backend_for
from ffmoe_core.config import ACTIVATIONS
from tests import reference
from tests.support import DTYPES, NumpyKind, assert_close, bits, numbers, rounded

# T, H and J: nothing, one token, widths of the fast path and others, more rows and columns than a tile has
SIZES = [(0, 8, 8), (1, 16, 8), (33, 37, 19), (70, 64, 48), (300, 136, 200)]


def block(T, H, J, dtype):
    """x, w_up, w_down and the output's gradient as numbers that the dtype can hold."""
    rng = np.random.default_rng(0)
    scaled = (((T, H), 1.0), ((2 * J, H), H**-0.5), ((H, J), J**-0.5), ((T, H), 1.0))
    return [rounded(rng.standard_normal(shape) * scale, dtype) for shape, scale in scaled]


def both_ways(x, w_up, w_down, d_out, activation="swiglu", **options):
    """Everything that the four functions return, by name."""
    a, z = glu_up(x, w_up, activation, **options)
    dz, dw_down = glu_down_backward(d_out, z, w_down, activation, **options)
    dx, dw_up = glu_up_backward(dz, x, w_up)
    output = glu_down(a, w_down, **options)
    return {"z": z, "a": a, "output": output, "dz": dz, "dw_down": dw_down, "dx": dx, "dw_up": dw_up}


@pytest.fixture
def poisoned(monkeypatch, kind):
    """New arrays are NaN."""
    empty = kind.module.empty

    def dirty(shape, dtype=float, *args, **kwargs):
        array = empty(shape, dtype, *args, **kwargs)
        array.view(np.uint8)[...] = 0xFF
        return array

    monkeypatch.setattr(kind.module, "empty", dirty)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_and_gradients(kind, poisoned, sizes, dtype, activation):
    values = block(*sizes, dtype)
    arrays = [kind.array(value, dtype) for value in values]
    before = [bits(kind, array) for array in arrays]
    got = both_ways(*arrays, activation)
    want = vars(reference.dense_glu(*values, activation))
    assert got.keys() == want.keys()
    for name, array in got.items():
        assert kind.is_kind(array)
        assert array.dtype == arrays[0].dtype
        assert_close(numbers(kind, array), want[name], dtype, name)
    assert before == [bits(kind, array) for array in arrays]
    again = both_ways(*arrays, activation, spared=2)  # all of a product's rows
    assert all(bits(kind, got[name]) == bits(kind, again[name]) for name in got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_arrays_that_are_there(kind, dtype):
    x, w_up, w_down, d_out = (kind.array(value, dtype) for value in block(33, 24, 16, dtype))
    want = both_ways(x, w_up, w_down, d_out)
    a, z, alone, output = (kind.full((33, width), np.nan, dtype) for width in (16, 32, 16, 24))
    got = glu_up(x, w_up, out=(a, z))
    assert got[0] is a
    assert got[1] is z
    assert glu_up(x, w_up, keep_z=False, out=(alone, None)) == (alone, None)
    assert glu_down(a, w_down, out=output) is output
    for array, name in ((a, "a"), (z, "z"), (alone, "a"), (output, "output")):
        assert bits(kind, array) == bits(kind, want[name])


def test_arrays_that_nothing_can_be_put_into(kind):
    x, w_up, w_down, _ = (kind.array(value, "float32") for value in block(5, 8, 6, "float32"))
    a, z, output = (kind.full((5, width), 0, "float32") for width in (6, 12, 8))
    for out, options in (((a,), {}), (a, {}), ((a, None), {}), ((a, z), {"keep_z": False}), ((None, z), {})):
        with pytest.raises(errors.ConfigError, match=r"out must be a pair \(a, (z|None)\) with keep_z="):
            glu_up(x, w_up, out=out, **options)
    with pytest.raises(errors.ShapeError, match=r"out\[0\] has shape \(5, 12\); expected \(5, 6\)"):
        glu_up(x, w_up, out=(z, z))
    with pytest.raises(errors.DTypeError, match=r"out\[1\] has dtype float64 but x has float32"):
        glu_up(x, w_up, out=(a, kind.full((5, 12), 0, "float64")))
    both = kind.full((5 * 12,), 0, "float32")
    with pytest.raises(errors.LayoutError, match=r"out\[1\] overlaps out\[0\]"):
        glu_up(x, w_up, out=(both[:30].reshape(5, 6), both.reshape(5, 12)))
    with pytest.raises(errors.LayoutError, match=r"out\[0\] overlaps x"):
        glu_up(x, w_up, out=(x.reshape(-1)[:30].reshape(5, 6), z))
    with pytest.raises(errors.ShapeError, match=r"out has shape \(5, 6\); expected \(5, 8\)"):
        glu_down(a, w_down, out=a)
    with pytest.raises(errors.LayoutError, match="out overlaps w_down"):
        glu_down(a, w_down, out=w_down.reshape(-1)[:40].reshape(5, 8))
    glu_down(a, w_down, out=output)


def test_what_is_not_wanted_is_none(kind):
    x, w_up, w_down, d_out = (kind.array(value, "float32") for value in block(5, 8, 6, "float32"))
    full = both_ways(x, w_up, w_down, d_out)
    a, z = glu_up(x, w_up, keep_z=False)
    assert z is None
    assert bits(kind, a) == bits(kind, full["a"])
    dz, dw_down = glu_down_backward(d_out, full["z"], w_down, weight_grad=False)
    assert dw_down is None
    assert bits(kind, dz) == bits(kind, full["dz"])
    for x_grad, weight_grad in ((True, False), (False, True), (False, False)):
        dx, dw_up = glu_up_backward(dz, x, w_up, x_grad=x_grad, weight_grad=weight_grad)
        assert (dx is not None, dw_up is not None) == (x_grad, weight_grad)
        assert dx is None or bits(kind, dx) == bits(kind, full["dx"])
        assert dw_up is None or bits(kind, dw_up) == bits(kind, full["dw_up"])


@pytest.fixture
def spared(kind, monkeypatch):
    """What each product left free, and which of how many pieces of its rows it was."""
    arrays = [kind.array(value, "float32") for value in block(5, 8, 6, "float32")]
    backend, seen = backend_for(as_array(arrays[0])[1]), []

    def watched(stage):
        def call(space: Space, *arguments):
            seen.append(
                (
                    space.spared,
                    *(arguments[-2:] if stage.__name__ != "grouped_gemm_wgrad" else arguments[-1:]),
                )
            )
            stage(space, *arguments)

        return call

    for name in ("grouped_glu", "grouped_gemm", "grouped_glu_backward", "grouped_gemm_wgrad"):
        monkeypatch.setattr(backend, name, staticmethod(watched(getattr(backend, name))))
    return seen


def test_products_of_rows_spare_multiprocessors(kind, spared):
    """Where asked to; the gradients of weights, and what runs beside no exchange, never do."""
    arrays = [kind.array(value, "float32") for value in block(5, 8, 6, "float32")]
    for count in (3, 0):
        spared.clear()
        both_ways(*arrays, spared=count)
        assert [each[0] for each in spared] == [count, count, 0, 0, 0, count]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_rows_alone_spare_multiprocessors(kind, spared, dtype):
    """On a GPU the same bits, where BLAS may sum fewer rows in another order.

    A few rows more or less than asked for, as a launch for a few is not worth it.
    """
    T, H, J = 2100, 8, 16
    arrays = [kind.array(value, dtype) for value in block(T, H, J, dtype)]
    whole = both_ways(*arrays)
    spared.clear()
    a_row = 2 * H * J
    parts = both_ways(*arrays, spared=3, spared_flop=a_row * 600)
    assert [each[0] for each in spared] == [3, 0, 3, 0, 0, 0, 0, 3, 0]
    assert spared[0] == (3, 2, 0)
    assert spared[1] == (0, 2, 1)
    for name in whole:
        assert_close(numbers(kind, parts[name]), numbers(kind, whole[name]), dtype, name)
        assert kind.name == "numpy" or bits(kind, whole[name]) == bits(kind, parts[name])
    for flop, count in ((a_row * 1500, 3), (a_row * T, 3), (0.0, 0)):
        spared.clear()
        glu_down(whole["a"], arrays[2], spared=3, spared_flop=flop)
        assert spared == [(count, 1, 0)]


@pytest.mark.parametrize(("dtype", "value"), [("int32", 2**31 - 1), ("float32", 0.1), ("float64", 0.1)])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_fill(kind, dtype, value, size):
    array = kind.full((size,), 7, dtype)
    view, space = as_array(array)
    backend_for(space).fill(space, view, value)
    assert numbers(kind, array).tolist() == [rounded(value, dtype)] * size


# --- what is refused ---

T, H, J = 5, 8, 6


def arguments():
    values = {
        "x": (T, H),
        "w_up": (2 * J, H),
        "a": (T, J),
        "w_down": (H, J),
        "grad_output": (T, H),
        "z": (T, 2 * J),
        "dz": (T, 2 * J),
    }
    return {name: np.zeros(shape, np.float32) for name, shape in values.items()}


CALLS = {
    glu_up: ("x", "w_up"),
    glu_down: ("a", "w_down"),
    glu_down_backward: ("grad_output", "z", "w_down"),
    glu_up_backward: ("dz", "x", "w_up"),
}
BAD = [
    (glu_up, {"x": lambda v: v[0]}, errors.ShapeError, r"x has shape \(8,\); expected \[T, d_model\]"),
    (glu_up, {"x": lambda v: v[:, :0]}, errors.ShapeError, r"x has shape \(5, 0\).*at least 1"),
    (glu_up, {"x": lambda v: v.astype(np.int32)}, errors.DTypeError, "x has dtype int32; expected float32 or"),
    (glu_up, {"x": lambda v: v[:, ::-1]}, errors.LayoutError, "x is not C-contiguous"),
    (glu_up, {"w_up": lambda v: v[:, 1:].copy()}, errors.ShapeError, r"w_up has shape \(12, 7\).*\(any, 8\)"),
    (glu_up, {"w_up": lambda v: v[1:]}, errors.ShapeError, r"w_up has shape \(11, 8\).*as many up rows"),
    (glu_up, {"w_up": lambda v: v[:0]}, errors.ShapeError, r"w_up has shape \(0, 8\)"),
    (glu_up, {"w_up": np.float64}, errors.DTypeError, "w_up has dtype float64 but x has float32"),
    (glu_down, {"w_down": lambda v: v[:, 1:].copy()}, errors.ShapeError, r"w_down has shape \(8, 5\).*any, 6"),
    (glu_down, {"w_down": lambda v: v[:0]}, errors.ShapeError, r"w_down has shape \(0, 6\).*at least 1"),
    (glu_down, {"w_down": np.float64}, errors.DTypeError, "w_down has dtype float64 but a has float32"),
    (glu_down_backward, {"w_down": lambda v: v[1:]}, errors.ShapeError, r"w_down has shape \(7, 6\).*8, any"),
    (glu_down_backward, {"w_down": lambda v: v[:, :0]}, errors.ShapeError, r"w_down has shape \(8, 0\)"),
    (glu_down_backward, {"z": lambda v: v[1:]}, errors.ShapeError, r"z has shape \(4, 12\).*\(5, 12\)"),
    (glu_down_backward, {"z": np.float16}, errors.DTypeError, "z has dtype float16 but grad_output has float32"),
    (glu_up_backward, {"dz": lambda v: v[:, 1:].copy()}, errors.ShapeError, r"dz has shape \(5, 11\).*5, 12"),
    (glu_up_backward, {"dz": np.float64}, errors.DTypeError, "dz has dtype float64 but x has float32"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "changes", "error", "message"), BAD)
def test_arrays_that_do_not_fit(function, changes, error, message):
    given = arguments()
    function(*(given[name] for name in CALLS[function]))
    for name, change in changes.items():
        given[name] = change(given[name])
    with pytest.raises(error, match=message):
        function(*(given[name] for name in CALLS[function]))


@pytest.mark.parametrize("function", [glu_up, glu_down_backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("activation", ["relu", None, 3])
def test_activations_that_are_unknown(function, activation):
    given = arguments()
    with pytest.raises(errors.ConfigError, match=f"activation={activation!r} is unknown; known: 'swiglu'"):
        function(*(given[name] for name in CALLS[function]), activation)


BESIDE_EXCHANGES = [glu_up, glu_down, glu_down_backward]


@pytest.mark.parametrize("function", BESIDE_EXCHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("spared", [-1, 1.0, True, None, 1 << 40])
def test_spared_out_of_range(function, spared):
    given = arguments()
    with pytest.raises(errors.ConfigError, match=f"spared={spared}.*int from 0"):
        function(*(given[name] for name in CALLS[function]), spared=spared)


@pytest.mark.parametrize("function", BESIDE_EXCHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("flop", [-1, -0.5, float("nan"), True, None, "1"])
def test_spared_flop_out_of_range(function, flop):
    given = arguments()
    with pytest.raises(errors.ConfigError, match=f"spared_flop={flop!r}.*at least 0"):
        function(*(given[name] for name in CALLS[function]), spared=1, spared_flop=flop)


@pytest.mark.gpu
def test_arrays_on_two_devices(cupy_kind):
    x = cupy_kind.array(np.zeros((T, H)), "float32")
    with pytest.raises(errors.DeviceError, match="w_up is on cpu but x is on cuda:0"):
        glu_up(x, NumpyKind().array(np.zeros((2 * J, H)), "float32"))
