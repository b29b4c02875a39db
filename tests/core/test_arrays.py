"""Arrays that speak nothing but DLPack go in and come out in their own kind."""

from types import SimpleNamespace

import numpy as np
import pytest

from ffmoe_core import MoEConfig, moe_backward, moe_forward
from ffmoe_core.arrays import as_array
from tests.core.checks import run_layer
from tests.support import bits, random_layer

CONFIG = MoEConfig(d_model=6, ffn_dim=8, num_experts=4, top_k=2)


class Boxed:
    """A framework's array: memory that is only to be had by ``__dlpack__``."""

    def __init__(self, memory):
        self.memory = memory

    def __dlpack__(self, **kwargs):
        return self.memory.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.memory.__dlpack_device__()

    def __array_namespace__(self):
        def from_dlpack(memory):
            assert not isinstance(memory, Boxed)
            return Boxed(memory)

        return SimpleNamespace(__name__="boxes", from_dlpack=from_dlpack)


def test_a_kind_with_dlpack_alone(kind):
    layer = random_layer(CONFIG, 9, "float32")
    plain, plain_grads = run_layer(kind, CONFIG, layer, "float32")
    x, gate, up, down, d_out = (
        Boxed(kind.array(getattr(layer, name), "float32"))
        for name in ("x", "gate_weight", "w_up", "w_down", "grad_output")
    )
    result = moe_forward(x, gate, up, down, CONFIG)
    grads = moe_backward(d_out, result.saved, x, gate, up, down, CONFIG)
    parts = (result.output, result.losses, result.routing, *result.saved)
    assert all(isinstance(part, Boxed) for part in parts if part is not None)
    assert all(isinstance(part, Boxed) for part in grads if part is not None)
    assert bits(kind, result.output.memory) == bits(kind, plain.output)
    layer.grad_losses[:] = 0
    assert bits(kind, grads.w_up.memory) == bits(kind, plain_grads.w_up)


def test_views_share_memory(kind):
    source = kind.array(np.arange(12).reshape(3, 4), "float32")
    array, _ = as_array(source, "source")
    assert array.shape == (3, 4)
    assert array.size == 12
    assert array.nbytes == 48
    assert array.ptr == (source.ctypes.data if kind.name == "numpy" else source.data.ptr)
    part = array.at(16, (2, 4), array.dtype)
    assert part.ptr == array.ptr + 16
    assert part.shape == (2, 4)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int32", "int64", "uint8"])
def test_new_arrays_are_of_the_callers_kind(kind, dtype):
    array, space = as_array(kind.full((2,), 0, dtype))
    new = space.export(space.empty((3, 5), array.dtype))
    assert kind.is_kind(new)
    assert new.shape == (3, 5)
    assert str(new.dtype) == dtype
    assert new.flags.c_contiguous
    assert space.export(space.empty((0, 5), array.dtype)).shape == (0, 5)
