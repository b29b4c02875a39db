"""Kinds of arrays, how close results must come, and random layers to try."""

from types import SimpleNamespace

import numpy as np

DTYPES = ("float32", "float64", "bfloat16", "float16")

# Of the result's norm, and of its largest element. Unit roundoffs: 1e-16, 6e-8, 5e-4, 4e-3; results in 16
# bits are rounded once or twice on top of intermediate results in 16 bits.
TOLERANCE = {
    "float64": (1e-13, 1e-12),
    "float32": (3e-6, 1e-5),
    "float16": (1.5e-3, 5e-3),
    "bfloat16": (1e-2, 3e-2),
}
FEW = 64  # numbers: too few for their rounding errors to average out


def numpy_dtype(name):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def router_dtype(dtype):
    """What the router of a layer of this dtype computes in."""
    return "float64" if dtype == "float64" else "float32"


def rounded(values, dtype):
    """``values`` as float64 numbers that ``dtype`` can hold."""
    return np.asarray(values, dtype=np.float64).astype(numpy_dtype(dtype)).astype(np.float64)


class NumpyKind:
    """Arrays of NumPy, on the CPU."""

    name = "numpy"

    @property
    def module(self):
        return np

    def array(self, values, dtype):
        return np.array(np.asarray(values).astype(numpy_dtype(dtype)), order="C")

    def full(self, shape, value, dtype):
        return self.array(np.full(shape, value), dtype)

    def host(self, array):
        """The array as NumPy, bit for bit."""
        return np.asarray(array)

    def is_kind(self, array):
        return isinstance(array, np.ndarray)


class CupyKind(NumpyKind):
    """Arrays of CuPy, on the current GPU."""

    name = "cupy"

    @property
    def module(self):
        import cupy

        return cupy

    def array(self, values, dtype):
        return self.module.asarray(super().array(values, dtype))

    def host(self, array):
        return self.module.asnumpy(array)

    def is_kind(self, array):
        return isinstance(array, self.module.ndarray)


def numbers(kind, array):
    """An array of any kind and dtype as float64 (integers as int64)."""
    host = kind.host(array)
    return host.astype(np.int64 if host.dtype.kind in "iub" else np.float64)


def bits(kind, array):
    """The array's bytes, to compare two results bit for bit."""
    return kind.host(array).tobytes()


def same_bits(kind, ones, others):
    """Whether two tuples of arrays (or None) hold the same bits."""
    return [None if a is None else bits(kind, a) for a in ones] == [
        None if a is None else bits(kind, a) for a in others
    ]


def assert_close(got, want, dtype, what="", scale=0.0, independent=None):
    """``got`` (float64 numbers) is ``want`` up to the rounding of ``dtype``.

    ``scale`` is the size of terms that may cancel in an element of ``want``: errors are relative to no less
    than it. ``independent`` is how many numbers with errors of their own it was made from, if not its size.
    """
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    if want.size == 0:
        return
    assert np.isfinite(got).all(), f"{what}: {np.sum(~np.isfinite(got))} of {got.size} elements not finite"
    error = np.abs(got - want)
    norm, worst = max(np.linalg.norm(want), scale * want.size**0.5), max(np.max(np.abs(want)), scale)
    norm_bound, worst_bound = TOLERANCE[dtype]
    if (want.size if independent is None else independent) < FEW:
        norm_bound = worst_bound
    assert np.linalg.norm(error) <= norm_bound * norm, (
        f"{what}: relative error of the norm {np.linalg.norm(error) / max(norm, 1e-300):.2e} "
        f"above {norm_bound:.0e} ({dtype})"
    )
    assert np.max(error) <= worst_bound * worst, (
        f"{what}: worst element off by {np.max(error) / max(worst, 1e-300):.2e} of the largest, "
        f"above {worst_bound:.0e} ({dtype})"
    )


def random_layer(config, num_tokens, dtype="float64", *, seed=0, gate_dtype=None, gate_scale=1.0):
    """Inputs of a layer as float64 numbers that the dtypes can hold: a namespace."""
    rng = np.random.default_rng(seed)
    T, H, E, width = num_tokens, config.d_model, config.num_experts, config.ffn_dim // 2

    def normal(*shape, scale=1.0, dtype=dtype):
        return rounded(rng.standard_normal(shape) * scale, dtype)

    return SimpleNamespace(
        x=normal(T, H),
        gate_weight=normal(E, H, scale=gate_scale / H**0.5, dtype=gate_dtype or dtype),
        w_up=normal(E, 2 * width, H, scale=H**-0.5),
        w_down=normal(E, H, width, scale=width**-0.5),
        router_input=normal(T, H),
        expert_bias=normal(E, scale=0.2, dtype="float32"),
        valid_mask=rng.random(T) < 0.8,
        grad_output=normal(T, H),
        grad_losses=normal(3, dtype=router_dtype(dtype)),
    )
