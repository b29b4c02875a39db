"""What several files of the core's tests do: call one stage, run a whole layer against the reference."""

import numpy as np

from ffmoe_core import moe_backward, moe_forward, route, unpack_routing
from ffmoe_core.arrays import as_array
from ffmoe_core.backend import backend_for
from tests import reference
from tests.support import assert_close, bits, numbers, router_dtype

# Of the largest choice value: float32 rounding of a score plus its bias.
NEAR_TIE = {"float32": 1e-6, "float64": 1e-14}


def call_stage(kind, name, *args):
    """Run one stage of the kind's backend on the kind's arrays."""
    _, space = as_array(kind.full((1,), 0, "uint8"))
    views = [as_array(arg)[0] if hasattr(arg, "__dlpack__") else arg for arg in args]
    getattr(backend_for(space), name)(space, *views)


def check_selection(config, logits, topk_idx, expert_bias, dtype):
    """One token's experts are right for its logits; near-ties of rounded scores may go either way."""
    if expert_bias is None and config.num_expert_groups is None:
        assert topk_idx.tolist() == reference.select(config, logits)
        return
    assert len(set(topk_idx)) == config.top_k
    assert all(0 <= e < config.num_experts for e in topk_idx)
    choice = reference.choices(config, logits, expert_bias)
    slack = NEAR_TIE[dtype] * np.max(np.abs(choice))
    allowed = np.ones(config.num_experts, dtype=bool)
    if config.num_expert_groups is not None:
        sums = reference.group_scores(config, choice)
        size = config.num_experts // config.num_expert_groups
        cut = sums[reference.best(sums, config.topk_groups)[-1]]
        used = set(topk_idx // size)
        assert len(used) <= config.topk_groups
        assert all(sums[g] >= cut - 2 * slack for g in used)
        # groups tied for the last places may be in or out; one that was used is in
        tied = np.abs(sums - cut) <= 2 * slack
        no_choice = np.sum(sums >= cut - 2 * slack) == config.topk_groups
        in_use = [(s >= cut and (no_choice or not tied[g])) or g in used for g, s in enumerate(sums)]
        allowed = np.repeat(in_use, size)
    chosen = choice[topk_idx]
    assert (np.diff(chosen) <= 2 * slack).all(), "not ordered by choice"
    others = np.setdiff1d(np.flatnonzero(allowed), topk_idx)
    assert not others.size or choice[others].max() <= chosen.min() + 2 * slack, "a better expert was left out"


def run_layer(kind, config, layer, dtype, *, gate_dtype=None, options=(), **calls):
    """The layer forward and backward on the kind's arrays: (result, grads).

    ``options`` are the names of the optional inputs to use.
    """
    gate_dtype = gate_dtype or dtype
    inputs = [
        kind.array(layer.x, dtype),
        kind.array(layer.gate_weight, gate_dtype),
        kind.array(layer.w_up, dtype),
        kind.array(layer.w_down, dtype),
    ]
    routed = kind.array(layer.router_input, dtype) if "router_input" in options else None
    bias = kind.array(layer.expert_bias, "float32") if "expert_bias" in options else None
    mask = kind.array(layer.valid_mask, "uint8") if "valid_mask" in options else None
    result = moe_forward(*inputs, config, router_input=routed, expert_bias=bias, valid_mask=mask, **calls)
    grads = moe_backward(
        kind.array(layer.grad_output, dtype),
        result.saved,
        *inputs,
        config,
        router_input=routed,
        grad_losses=kind.array(layer.grad_losses, router_dtype(dtype)),
    )
    return result, grads


def routing_parts(kind, config, result, dtype):
    """tokens_per_expert and the plan of a result, as the kind's arrays."""
    return unpack_routing(
        result.routing, len(result.output), config.top_k, config.num_experts, router_dtype(dtype)
    )


def check_plan(plan, kept, num_experts):
    """A plan of numbers places the kept pairs as the reference does."""
    want = reference.sort(plan.topk_idx, plan.topk_weights, num_experts, kept)
    assert plan.expert_offsets.tolist() == want.expert_offsets.tolist()
    assert plan.token_rows.tolist() == want.token_rows.tolist()
    assert plan.row_token.tolist() == want.row_token.tolist()
    assert plan.row_weights.tolist() == want.row_weights.tolist()


def check_layer(kind, config, layer, dtype, *, gate_dtype=None, options=()):
    """Everything the layer computes, and every gradient, is what the reference says. Returns the numbers."""
    result, grads = run_layer(kind, config, layer, dtype, gate_dtype=gate_dtype, options=options)
    T, E, W = len(layer.x), config.num_experts, router_dtype(dtype)
    chosen = {name: getattr(layer, name) for name in options}
    inputs = {name: getattr(layer, name) for name in ("x", "gate_weight", "w_up", "w_down")}
    shared = {"router_input": chosen.get("router_input")}
    valid = chosen.get("valid_mask", np.ones(T, dtype=bool))

    # decisions: exact, given the layer's own logits and weights
    routed = chosen.get("router_input", layer.x)
    logits = route(
        kind.array(routed, dtype), kind.array(layer.gate_weight, gate_dtype or dtype), config
    ).logits
    kept_logits = result.saved.logits
    assert (kept_logits is not None) == config.keeps_logits
    assert kept_logits is None or bits(kind, kept_logits) == bits(kind, logits)
    logits = numbers(kind, logits)
    counts, plan = routing_parts(kind, config, result, dtype)
    counts, plan = numbers(kind, counts), type(plan)(*(numbers(kind, part) for part in plan))
    for t in range(T):
        if valid[t]:
            check_selection(config, logits[t], plan.topk_idx[t], chosen.get("expert_bias"), W)
        else:
            assert (plan.topk_idx[t] == -1).all()
            assert (plan.topk_weights[t] == 0).all()
    assert counts.tolist() == reference.count(plan.topk_idx, E).tolist()
    kept = reference.keep(
        plan.topk_idx, plan.topk_weights, E, reference.capacity(config, T), config.drop_policy
    )
    check_plan(plan, kept, E)

    # values, given the decisions
    want = reference.moe_forward(**inputs, config=config, topk_idx=plan.topk_idx, kept=kept, **chosen)
    wanted = reference.moe_backward(
        layer.grad_output, want, **inputs, config=config, grad_losses=layer.grad_losses, **shared
    )
    assert_close(logits, want.logits, W, "logits")
    assert_close(plan.topk_weights, want.topk_weights, W, "topk_weights")
    for i, name in enumerate(("aux_loss", "z_loss", "entropy")):
        assert_close(numbers(kind, result.losses)[i : i + 1], want.losses[i : i + 1], W, name)
    assert_close(numbers(kind, result.output), want.output, dtype, "output")
    for name in ("x", "w_up", "w_down"):
        assert_close(numbers(kind, getattr(grads, name)), getattr(wanted, name), dtype, f"gradient of {name}")
    # the router's gradients come from differences of one number a pair, which may cancel altogether
    for name in ("gate_weight", "router_input"):
        got, expected = getattr(grads, name), getattr(wanted, name)
        assert (got is None) == (expected is None)
        if got is not None:
            assert_close(
                numbers(kind, got),
                expected,
                dtype,
                f"gradient of {name}",
                scale=1.0,
                independent=plan.topk_idx.size,
            )
    return want, wanted
