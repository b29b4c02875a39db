"""stats(), and the expert bias that follows the counts."""

import math

import numpy as np
import pytest
import torch

from ffmoe_core.errors import ConfigError
from tests import reference
from tests.torch.checks import make_layer, numbers, random_tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capacity_factor": 0.75},
        {"gating": "sigmoid", "drop_policy": "probs", "max_tokens_per_expert": 3},
    ],
    ids=str,
)
def test_statistics_are_the_references(device, options):
    layer, x = (
        make_layer(device, torch.float64, **options),
        random_tokens(40, device=device, dtype=torch.float64),
    )
    layer(x)
    want = reference.moe_forward(
        numbers(x), numbers(layer.gate.weight), numbers(layer.w_up), numbers(layer.w_down), layer.config
    )
    stats = layer.stats()
    assert stats.tokens_per_expert.dtype == torch.int32
    assert stats.tokens_per_expert.device == x.device
    assert stats.tokens_per_expert.tolist() == want.tokens_per_expert.tolist()
    assert stats.dropped == np.sum(~want.kept)
    assert bool(options) == (stats.dropped > 0)
    assert stats.load_imbalance == pytest.approx(want.tokens_per_expert.max() / want.tokens_per_expert.mean())
    assert stats.router_entropy == pytest.approx(want.losses[2])
    assert "dropped" in repr(stats)


@pytest.mark.parametrize("called", [True, False])
def test_no_tokens(device, called):
    layer = make_layer(device)
    if called:
        layer(random_tokens(0, device=device))
    stats = layer.stats()
    assert stats.tokens_per_expert.tolist() == [0] * 6
    assert (stats.dropped, stats.load_imbalance, stats.router_entropy) == (0, 1.0, 0.0)


def test_statistics_are_of_one_call_and_hold_no_graph(device):
    layer = make_layer(device)
    layer(random_tokens(5, device=device))
    first = layer.stats()
    layer(random_tokens(7, device=device))
    assert first.tokens_per_expert.sum() == 10
    assert layer.stats().tokens_per_expert.sum() == 14
    assert not any(t.requires_grad for part in layer._last for t in part)


def test_uniform_router_has_the_largest_entropy(device):
    layer = make_layer(device)
    torch.nn.init.zeros_(layer.gate.weight)
    layer(random_tokens(5, device=device))
    assert layer.stats().router_entropy == pytest.approx(math.log(6), rel=1e-6)
    assert layer.stats().tokens_per_expert.tolist() == [5, 5, 0, 0, 0, 0]  # ties go to the lower expert
    assert layer.stats().load_imbalance == pytest.approx(3.0)


# --- expert bias ---


def test_update_follows_the_counts(device):
    layer = make_layer(device, expert_bias=True)
    total = torch.zeros(6, dtype=torch.int64, device=device)
    for _ in range(3):
        layer(random_tokens(10, device=device))
        total += layer.stats().tokens_per_expert
    assert torch.equal(layer.expert_counts, total)
    before = layer.expert_bias.clone()
    layer.update_expert_bias(0.001)
    want = before + 0.001 * torch.sign(total.double().mean() - total).float()
    assert torch.equal(layer.expert_bias, want)
    assert not layer.expert_counts.any()
    layer.update_expert_bias(0.001)
    assert torch.equal(layer.expert_bias, want)


def test_counts_are_of_training_calls():
    layer = make_layer(expert_bias=True).eval()
    layer(random_tokens(10))
    assert not layer.expert_counts.any()
    assert "expert_counts" not in layer.state_dict()


def test_updates_balance_a_skewed_router(device):
    layer = make_layer(device, expert_bias=True, gating="sigmoid")
    torch.nn.init.zeros_(layer.expert_bias)
    x = random_tokens(256, device=device).detach()
    with torch.no_grad():
        layer.gate.weight[0] += 0.3 * x.mean(0) / x.mean(0).norm()
        x += 2 * x.mean(0) / x.mean(0).norm()
    layer(x)
    before = layer.stats().load_imbalance
    for _ in range(200):
        layer(x)
        layer.update_expert_bias(0.01)
    assert before > 1.5
    assert layer.stats().load_imbalance < 1.2


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), "0.1", None, True])
def test_update_needs_a_rate(rate):
    layer = make_layer(expert_bias=True)
    before = layer.expert_bias.clone()
    with pytest.raises(ConfigError, match="rate="):
        layer.update_expert_bias(rate)
    assert torch.equal(layer.expert_bias, before)


def test_update_needs_a_bias():
    with pytest.raises(ConfigError, match="expert_bias=True"):
        make_layer().update_expert_bias(0.001)
