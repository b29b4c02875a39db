"""What only a GPU has: graphs, streams, waiting, and memory that is counted."""

import pytest
import torch

from ffmoe_torch import MoELayer
from tests.torch.checks import LOSSES, SIZES, make_layer, random_tokens, results, same

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


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
def test_nothing_waits_for_the_device(options):
    layer, x = make_layer("cuda", **options), random_tokens(40, device="cuda")
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


def test_runs_on_the_current_stream():
    """Work waits for what the caller's stream was doing, and for nothing else."""
    layer, x = make_layer("cuda", **FULL).eval(), random_tokens(64, device="cuda")
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
