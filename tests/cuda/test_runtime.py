"""What only a GPU has: streams, graphs, its memory, its age."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ffmoe_core import MoEConfig, errors, moe_backward, moe_forward, unpack_routing
from ffmoe_core.cuda import compile as kernels
from tests.support import DTYPES, bits, random_layer, router_dtype, same_bits

CONFIG = MoEConfig(
    d_model=64,
    ffn_dim=96,
    num_experts=6,
    top_k=2,
    capacity_factor=1.25,
    drop_policy="probs",
    aux_loss_coeff=0.01,
    z_loss_coeff=0.001,
)
NUM_TOKENS = 50
INPUTS = ("x", "gate_weight", "w_up", "w_down")


def on_device(kind, dtype, seed=0, config=CONFIG):
    """(inputs, grad_output, grad_losses) of a layer on the GPU."""
    layer = random_layer(config, NUM_TOKENS, dtype, seed=seed)
    inputs = [kind.array(getattr(layer, name), dtype) for name in INPUTS]
    return inputs, kind.array(layer.grad_output, dtype), kind.array(layer.grad_losses, router_dtype(dtype))


def forward_backward(inputs, d_out, d_losses, config=CONFIG):
    """Of the routing block the indices of the experts; then every other output, and gradient, that is an array."""
    result = moe_forward(*inputs, config)
    grads = moe_backward(d_out, result.saved, *inputs, config, grad_losses=d_losses)
    dtype = str(result.losses.dtype)
    _, plan = unpack_routing(result.routing, NUM_TOKENS, config.top_k, config.num_experts, dtype)
    parts = (plan.topk_idx, result.output, result.losses, *result.saved[:2], *grads)
    return [part for part in parts if part is not None]


def overwrite(array, other):
    """Copy the bytes, on the current stream."""
    array.data.copy_from_device_async(other.data, other.nbytes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_calls_right_behind_each_other(cupy_kind, dtype):
    """Kernels come to the multiprocessors before the one ahead of them has ended, and wait for its results."""
    config = replace(CONFIG, aux_loss_coeff=0.0, z_loss_coeff=0.0)
    calls = [on_device(cupy_kind, dtype, seed, config) for seed in range(4)]
    want = []
    for call in calls:
        want.append(forward_backward(*call, config))
        cupy_kind.module.cuda.Device().synchronize()
    for _ in range(50):
        got = [forward_backward(*call, config) for call in calls]
    for arrays, expected in zip(got, want, strict=True):
        assert same_bits(cupy_kind, arrays, expected)


# A kernel that keeps its stream busy until the host says go, or a few seconds have passed.
WAIT = r"""
extern "C" __global__ void wait_for_host(volatile int* go, int* waited_in_vain) {
    long long start = clock64();
    while (*go == 0) {
        if (clock64() - start > 6000000000LL) { *waited_in_vain = 1; return; }
    }
}
"""


class Gate:
    """Holds a stream until opened; ``in_vain`` afterwards says that nobody opened it in time."""

    def __init__(self, cupy):
        self.kernel = cupy.RawKernel(WAIT, "wait_for_host")
        memory = cupy.cuda.alloc_pinned_memory(4)
        self.go = np.frombuffer(memory, np.int32, 1)
        self.go[0] = 0
        unowned = cupy.cuda.UnownedMemory(memory.ptr, 4, memory, 0)
        self.go_on_device = cupy.ndarray(1, np.int32, cupy.cuda.MemoryPointer(unowned, 0))
        self.vain = cupy.zeros(1, np.int32)
        cupy.cuda.Device().synchronize()

    def close(self):
        """On the current stream."""
        self.kernel((1,), (1,), (self.go_on_device, self.vain))

    def open(self):
        self.go[0] = 1

    @property
    def in_vain(self):
        return bool(self.vain.get()[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_work_is_done_on_the_callers_stream_without_waiting(cupy_kind, dtype):
    """While the stream is held, calls return; what they read is what the stream wrote before them."""
    cp = cupy_kind.module
    inputs, d_out, d_losses = on_device(cupy_kind, dtype)
    want = [bits(cupy_kind, part) for part in forward_backward(inputs, d_out, d_losses)]  # compiles, too
    x = inputs[0].copy()
    inputs[0].data.memset(7, x.nbytes)
    gate, stream = Gate(cp), cp.cuda.Stream(non_blocking=True)
    with stream:
        forward_backward(inputs, d_out, d_losses)  # fills this stream's memory pool
        stream.synchronize()
        gate.close()
        overwrite(inputs[0], x)
        got = forward_backward(inputs, d_out, d_losses)
        gate.open()
        stream.synchronize()
    assert not gate.in_vain, "a call waited for the stream"
    assert [bits(cupy_kind, part) for part in got] == want


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"recompute_activations": True}, {"aux_loss_coeff": 0.0, "z_loss_coeff": 0.0}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_of_forward_and_backward_replays(cupy_kind, dtype, options):
    """Captured once, replayed on other numbers that route and drop differently."""
    cp = cupy_kind.module
    config = replace(CONFIG, **options)
    inputs, d_out, d_losses = on_device(cupy_kind, dtype, config=config)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        forward_backward(inputs, d_out, d_losses, config)  # compiles, and fills this stream's memory pool
        stream.synchronize()
        stream.begin_capture(cp.cuda.runtime.streamCaptureModeGlobal)
        captured = forward_backward(inputs, d_out, d_losses, config)
        graph = stream.end_capture()
    routings = set()
    for seed in (1, 2):
        others, other_d_out, other_d_losses = on_device(cupy_kind, dtype, seed, config)
        eager = forward_backward(others, other_d_out, other_d_losses, config)
        for held, new in zip([*inputs, d_out, d_losses], [*others, other_d_out, other_d_losses], strict=True):
            overwrite(held, new)
        cp.cuda.Device().synchronize()
        for _ in range(2):
            graph.launch(stream)
            stream.synchronize()
            assert same_bits(cupy_kind, captured, eager)
        routings.add(bits(cupy_kind, eager[0]))
    assert len(routings) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dirty_memory_pool_does_not_matter(cupy_kind, dtype):
    """Memory that comes back from the pool full of NaN is as good as any."""
    cp = cupy_kind.module
    inputs, d_out, d_losses = on_device(cupy_kind, dtype)
    want = [bits(cupy_kind, part) for part in forward_backward(inputs, d_out, d_losses)]
    for _ in range(2):
        blocks = [cp.full(512 << i, 0xFF, cp.uint8) for i in range(12) for _ in range(6)]
        del blocks
        got = [bits(cupy_kind, part) for part in forward_backward(inputs, d_out, d_losses)]
        assert got == want


@pytest.mark.gpu
def test_out_of_memory_leaves_the_layer_usable(cupy_kind):
    pool = cupy_kind.module.get_default_memory_pool()
    inputs, d_out, d_losses = on_device(cupy_kind, "float32")
    want = [bits(cupy_kind, part) for part in forward_backward(inputs, d_out, d_losses)]
    limit = pool.get_limit()
    failures = 0
    while True:  # with ever more room: fails at once, in forward, in backward, not at all
        pool.free_all_blocks()
        pool.set_limit(size=pool.total_bytes() + (4096 << failures))
        try:
            forward_backward(inputs, d_out, d_losses)
        except errors.OutOfMemoryError:
            failures += 1
        else:
            break
        finally:
            pool.set_limit(size=limit)
        assert [bits(cupy_kind, part) for part in forward_backward(inputs, d_out, d_losses)] == want
    assert failures >= 3


@pytest.mark.gpu
def test_a_second_device(cupy_kind):
    cp = cupy_kind.module
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU")
    want = forward_backward(*on_device(cupy_kind, "float32"))
    with cp.cuda.Device(1):
        inputs, d_out, d_losses = on_device(cupy_kind, "float32")
    got = forward_backward(inputs, d_out, d_losses)  # while device 0 is current
    assert cp.cuda.runtime.getDevice() == 0
    assert all(part.device.id == 1 for part in got)
    with cp.cuda.Device(1):
        got = [bits(cupy_kind, part) for part in got]
    assert got == [bits(cupy_kind, part) for part in want]


def old_gpu(capability):
    """As much of CuPy as the check of a device needs."""
    device = SimpleNamespace(compute_capability=capability)
    runtime = SimpleNamespace(getDeviceProperties=lambda device_id: {"name": b"Some GPU"})
    return SimpleNamespace(cuda=SimpleNamespace(Device=lambda device_id: device, runtime=runtime))


@pytest.mark.parametrize("capability", ["70", "75", "61"])
def test_a_gpu_that_is_too_old(monkeypatch, capability):
    """Refused by name before anything is compiled for it."""
    monkeypatch.setattr(kernels, "import_cupy", lambda: old_gpu(capability))
    with pytest.raises(errors.DeviceError, match=rf"cuda:3 \(Some GPU\) is sm_{capability}.*sm_80"):
        kernels.load_function("routing.cu", "route", (), 3, 0)


@pytest.mark.parametrize("capability", ["80", "86", "89", "90", "100", "120"])
def test_a_gpu_that_is_new_enough(capability):
    assert kernels.check_architecture(old_gpu(capability), 0) is None
