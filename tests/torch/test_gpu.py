"""What only a GPU has: graphs, streams, waiting, and memory that is counted."""

import pytest
import torch

from ffmoe_torch import MoELayer
from ffmoe_torch.shared_expert import SharedExpert
from tests.support import assert_close
from tests.torch.checks import LOSSES, SIZES, make_layer, numbers, random_tokens, results, same

pytestmark = pytest.mark.gpu

FULL = {"num_shared_experts": 1, "latent_dim": 16, "expert_bias": True, "capacity_factor": 1.25, **LOSSES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"recompute_activations": True}, FULL], ids=["plain", "lean", "full"]
)
def test_forward_and_backward_in_a_cuda_graph(options, dtype):
    layer = make_layer("cuda", dtype, **options).eval()
    x = random_tokens(40, device="cuda", dtype=dtype)

    def step():
        output, losses = layer(x)
        total = output.float().sin().sum() + sum(losses.values())
        return output, *torch.autograd.grad(total, (x, *layer.parameters()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):  # other tokens, routed elsewhere, at the same addresses
        with torch.no_grad():
            x.normal_()
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert same(replayed, [t.detach() for t in step()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
def test_nothing_waits_for_the_device(options, dtype):
    layer, x = make_layer("cuda", dtype, **options), random_tokens(40, device="cuda", dtype=dtype)
    results(layer, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, losses = layer(x)
        (output.sum() + sum(losses.values())).backward()
        stats = layer.stats()
        if layer.expert_bias is not None:
            layer.update_expert_bias(0.001)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.tokens_per_expert.sum() == 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_on_the_current_stream(dtype):
    """Work waits for what the caller's stream was doing, and for nothing else."""
    layer = make_layer("cuda", dtype, **FULL).eval()
    x = random_tokens(64, device="cuda", dtype=dtype)
    want = results(layer, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late += x
        got = results(layer, late.detach().requires_grad_())
    stream.synchronize()
    assert same(got, want)


def test_the_shared_expert_is_safe_on_its_stream():
    """Memory handed from stream to stream and freed early is not reused too soon."""
    layer = make_layer("cuda", torch.bfloat16, d_model=512, ffn_dim=512, num_shared_experts=4)
    x = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    want = results(layer, x)
    for _ in range(20):
        assert same(results(layer, x), want)
        torch.full((4096, 512), float("nan"), device="cuda")  # takes what was just freed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_shared_expert_is_torchs_formula(dtype):
    """On the runtime's kernels, in a size of several tiles, by itself and in autocast; and the same bits every time."""
    T, H, J = 700, 264, 520
    expert = SharedExpert(H, J, device="cuda", dtype=dtype)
    x = torch.randn(T, H, device="cuda", dtype=dtype, requires_grad=True)
    exact = SharedExpert(H, J, device="cuda", dtype=torch.float64)
    exact.load_state_dict(expert.state_dict())
    y = x.detach().double().requires_grad_()
    grad = torch.randn_like(x)
    exact(y).backward(grad.double())
    want = [exact(y), y.grad, exact.w_up.grad, exact.w_down.grad]
    runs = []
    for _ in range(3):
        expert.zero_grad()
        x.grad = None
        output = expert(x)
        output.backward(grad)
        runs.append([output.detach(), x.grad, expert.w_up.grad, expert.w_down.grad])
    name = str(dtype).removeprefix("torch.")
    for got, wanted in zip(runs[0], want, strict=True):
        assert_close(numbers(got), numbers(wanted), name)
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])
    with torch.autocast("cuda", dtype=dtype):
        whole = SharedExpert(H, J, device="cuda")
        whole.load_state_dict(expert.state_dict())
        assert torch.equal(whole(x.float()), output)


def test_the_shared_expert_keeps_z_alone():
    T, H, J = 4096, 256, 512
    expert = SharedExpert(H, J, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expert(x)
    before = torch.cuda.memory_allocated()
    output = expert(x)
    rounding = T * J  # of the allocator: half of what the activations would take
    z = T * 2 * J * 2
    held = torch.cuda.memory_allocated() - before - output.numel() * 2
    assert z <= held < z + rounding
    del output
    with torch.no_grad():
        output = expert(x)
    assert torch.cuda.memory_allocated() - before - output.numel() * 2 < rounding


def test_what_the_layer_keeps_of_its_shared_expert():
    """Not the activations either, which are on another stream."""
    T, H, I = 4096, 256, 512
    held = []
    for shared in (0, 1):
        layer = MoELayer(H, 2 * I, 8, 2, num_shared_experts=shared, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        layer(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output, _ = layer(x)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        del output
    z = T * 2 * I * 2
    assert abs(held[1] - held[0] - z) < T * I  # half of the activations


def test_a_shared_expert_with_hooks_is_called_as_a_whole():
    layer = make_layer("cuda", torch.bfloat16, num_shared_experts=1)
    x, seen = random_tokens(40, device="cuda", dtype=torch.bfloat16), []
    want = results(layer, x)
    layer.shared_expert.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert same(results(layer, x), want)
    assert seen == [x.shape]


@pytest.mark.parametrize("kept", ["activations", "nothing"])
def test_memory_kept_for_backward(kept):
    T, H, I, E, K = 4096, 256, 512, 8, 2
    options = {"device": "cuda", "dtype": torch.bfloat16}
    layer = MoELayer(H, 2 * I, E, K, recompute_activations=kept == "nothing", **options)
    x = torch.randn(T, H, **options, requires_grad=True)
    layer(x)
    before = torch.cuda.memory_allocated()
    output, _ = layer(x)
    held = torch.cuda.memory_allocated() - before - output.numel() * 2
    rows = T * K
    routing = 20 * rows + (64 << 10)  # indices and weights, rounding of the allocator
    assert routing < 20 * rows + 4 * T * E  # logits would be seen
    activations = 2 * rows * 2 * I if kept == "activations" else 0
    assert activations <= held <= activations + routing


def test_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    layer = MoELayer(**SIZES, num_shared_experts=1, device="cuda:1")
    x = torch.randn(9, SIZES["d_model"], device="cuda:1", requires_grad=True)
    assert results(layer, x)[0].device == torch.device("cuda:1")
