"""The reference itself: its gradients against finite differences, its parts against worked examples."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from tests import reference
from tests.support import random_layer

ACTIVATIONS = ("swiglu", "geglu", "relu_squared")
T, H, E, K, WIDTH = 5, 4, 6, 3, 3

DEFAULTS = {
    "d_model": H,
    "ffn_dim": 2 * WIDTH,
    "num_experts": E,
    "top_k": K,
    "activation": "swiglu",
    "gating": "softmax",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_expert_groups": None,
    "topk_groups": None,
    "capacity_factor": None,
    "max_tokens_per_expert": None,
    "drop_policy": "position",
    "aux_loss_coeff": 0.7,
    "z_loss_coeff": 0.3,
}
CASES = {
    "plain": {},
    "softmax not renormalised": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "sigmoid": {"gating": "sigmoid", "routed_scaling_factor": 0.5},
    "sigmoid not renormalised": {"gating": "sigmoid", "norm_topk_prob": False},
    "geglu": {"activation": "geglu"},
    "relu_squared": {"activation": "relu_squared"},
    "dropping": {"max_tokens_per_expert": 2},
    "dropping the lightest": {"capacity_factor": 0.8, "drop_policy": "probs", "gating": "sigmoid"},
    "groups": {"num_expert_groups": 3, "topk_groups": 2},
}


def config_of(**options):
    return SimpleNamespace(**{**DEFAULTS, **options})


@pytest.mark.parametrize("own_router_input", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_slopes(case, own_router_input):
    config = config_of(**CASES[case])
    layer = random_layer(config, T, seed=len(case))
    layer.valid_mask = np.array([1, 1, 0, 1, 1])
    grad_losses = np.array([0.9, -1.3, 0.0])
    inputs = {name: getattr(layer, name) for name in ("x", "gate_weight", "w_up", "w_down")}
    if own_router_input:
        inputs["router_input"] = layer.router_input
    base = reference.moe_forward(**inputs, config=config, valid_mask=layer.valid_mask)
    if "dropping" in case:
        assert 0 < np.sum(~base.kept[base.valid]) < np.sum(base.kept)
    grads = reference.moe_backward(layer.grad_output, base, **inputs, config=config, grad_losses=grad_losses)

    def objective(**moved):
        result = reference.moe_forward(
            **{**inputs, **moved},
            config=config,
            valid_mask=layer.valid_mask,
            topk_idx=base.topk_idx,
            kept=base.kept,
        )
        return np.sum(layer.grad_output * result.output) + grad_losses @ result.losses

    step = 1e-5
    for name, value in inputs.items():
        slopes = np.zeros(value.shape)
        for place in np.ndindex(value.shape):
            ahead, behind = value.copy(), value.copy()
            ahead[place] += step
            behind[place] -= step
            slopes[place] = (objective(**{name: ahead}) - objective(**{name: behind})) / (2 * step)
        np.testing.assert_allclose(getattr(grads, name), slopes, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_a_dense_block_are_the_slopes(activation):
    layer = random_layer(config_of(num_experts=1), T)
    inputs = {"x": layer.x, "w_up": layer.w_up[0], "w_down": layer.w_down[0]}
    d_out = layer.grad_output
    base = reference.dense_glu(**inputs, d_out=d_out, activation=activation)
    for name, gradient in {"x": base.dx, "w_up": base.dw_up, "w_down": base.dw_down}.items():
        for place in np.ndindex(gradient.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = inputs[name].copy()
                moved[place] += step
                result = reference.dense_glu(**inputs | {name: moved}, d_out=d_out, activation=activation)
                ends.append(np.sum(d_out * result.output))
            assert abs((ends[0] - ends[1]) / 2e-6 - gradient[place]) < 1e-6


def test_selection_breaks_ties_to_the_lower_index():
    config = config_of()
    assert reference.select(config, np.array([1.0, 3, 1, 3, 1, 0])) == [1, 3, 0]


def test_selection_adds_the_bias_to_the_scores():
    config = config_of(gating="sigmoid", top_k=2)
    bias = np.array([0, 0, 0.6, 0, 0, 0])
    assert reference.select(config, np.array([0.0, 1, -1, 2, 0, 0]), bias) == [3, 2]  # 0.88, 0.27 + 0.6


def test_selection_stays_in_the_best_groups():
    config = config_of(num_expert_groups=3, topk_groups=1, top_k=2, gating="sigmoid")
    # group sums of scores: the one great expert of group 0 loses to the two good ones of group 2
    assert reference.select(config, np.array([3.0, -9, 0, 0, 1.5, 1.5])) == [4, 5]


def test_weights_of_a_worked_example():
    logits, idx = np.array([0.0, math.log(2), math.log(5), -50, -50, -50]), [2, 1]
    weigh = reference.weigh
    np.testing.assert_allclose(weigh(config_of(), logits, idx), [5 / 7, 2 / 7])
    np.testing.assert_allclose(weigh(config_of(norm_topk_prob=False), logits, idx), [5 / 8, 2 / 8])
    scores = np.array([5 / 6, 2 / 3])
    np.testing.assert_allclose(
        weigh(config_of(gating="sigmoid", routed_scaling_factor=3.0), logits, idx), 3 * scores / sum(scores)
    )
    np.testing.assert_allclose(weigh(config_of(gating="sigmoid", norm_topk_prob=False), logits, idx), scores)


def test_losses_of_a_worked_example():
    # even logits, all rows on expert 0: aux = E * 1 * (1/E) = 1; z = ln(E)^2; entropy = ln(E)
    config = config_of(top_k=1, aux_loss_coeff=1.0, z_loss_coeff=1.0)
    rows = np.array([2, 0, 0, 0, 0, 0])
    losses = reference.router_losses(config, np.zeros((3, E)), rows, [True, False, True])
    np.testing.assert_allclose(losses, [1.0, math.log(E) ** 2, math.log(E)])
    assert not reference.router_losses(config, np.zeros((3, E)), 0 * rows, [False] * 3).any()


def test_plan_of_a_worked_example():
    idx = np.array([[1, 0], [1, 2], [1, 2]])
    weights = np.array([[0.5, 0.1], [0.9, 0.2], [0.5, 0.3]])
    kept = reference.keep(idx, weights, 4, 2)
    assert kept.tolist() == [[True, True], [True, True], [False, True]]
    kept = reference.keep(idx, weights, 4, 1, "probs")
    assert kept.tolist() == [[False, True], [True, False], [False, True]]
    plan = reference.sort(idx, weights, 4, kept)
    assert plan.expert_offsets.tolist() == [0, 1, 2, 3, 3]
    assert plan.row_token.tolist() == [0, 1, 2, 0, 0, 0]
    assert plan.row_weights.tolist() == [0.1, 0.9, 0.3, 0, 0, 0]
    assert plan.token_rows.tolist() == [[-1, 0], [1, -1], [-1, 2]]


@pytest.mark.parametrize(
    ("options", "num_tokens", "limit"),
    [
        ({}, 10, None),
        ({"capacity_factor": 1.0}, 4, 2),
        ({"capacity_factor": 1.0}, 5, 3),
        ({"capacity_factor": 1.25}, 8, 5),
        ({"capacity_factor": 1.1}, 200, 110),  # which 1.1 * 200 is a bit more than, in floats
        ({"capacity_factor": 2.0, "max_tokens_per_expert": 3}, 8, 3),
        ({"capacity_factor": 0.25, "max_tokens_per_expert": 3}, 8, 1),
    ],
)
def test_capacity(options, num_tokens, limit):
    assert reference.capacity(config_of(**options), num_tokens) == limit
