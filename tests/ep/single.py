"""What one process holding all experts computes from all ranks' tokens: outputs, losses and gradients.

Capacity is a matter of the source rank, the losses may be of the whole group: so the outputs are those of one
call for each rank's tokens, without losses, and the losses those of one call with all tokens, without outputs.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from ffmoe_core import moe_backward, moe_forward, unpack_routing
from tests.support import numpy_dtype, random_layer, router_dtype


def group_layer(config, tokens, dtype, *, seed=0, gate_scale=1.0):
    """A layer with tokens[r] tokens on rank r, as NumPy arrays of ``dtype``; identical on every rank."""
    layer = random_layer(config, sum(tokens), dtype, seed=seed, gate_scale=gate_scale)
    kinds = {"expert_bias": "float32", "valid_mask": "bool", "grad_losses": router_dtype(dtype)}
    arrays = {
        name: np.ascontiguousarray(value.astype(numpy_dtype(kinds.get(name, dtype))))
        for name, value in vars(layer).items()
    }
    ends = np.cumsum(tokens)
    cuts = [slice(int(end - count), int(end)) for end, count in zip(ends, tokens, strict=True)]
    return SimpleNamespace(**arrays, cuts=cuts)


def call(layer, cut, config, inputs, grad_output, grad_losses):
    """moe_forward and moe_backward on some of the tokens."""
    options = {name: getattr(layer, name)[cut] for name in ("router_input", "valid_mask") if name in inputs}
    if "expert_bias" in inputs:
        options["expert_bias"] = layer.expert_bias
    arguments = (layer.x[cut], layer.gate_weight, layer.w_up, layer.w_down, config)
    result = moe_forward(*arguments, **options)
    routed = {"router_input": options["router_input"]} if "router_input" in options else {}
    grads = moe_backward(grad_output, result.saved, *arguments, grad_losses=grad_losses, **routed)
    return result, grads


def single_process(layer, config, inputs, loss_scope, dtype):
    """Lists by rank: outputs, losses, dx, d_router, and the group's sums of the weights' gradients."""
    ranks = len(layer.cuts)
    plain = replace(config, aux_loss_coeff=0.0, z_loss_coeff=0.0)
    out = SimpleNamespace(output=[], losses=[], x=[], router_input=[], topk_idx=[], kept=[], counts=0)
    weights = {"gate_weight": 0.0, "w_up": 0.0, "w_down": 0.0}
    zero_losses = np.zeros(3, layer.grad_losses.dtype)

    def add(grads):
        for name in weights:
            weights[name] = weights[name] + getattr(grads, name).astype(np.float64)

    for cut in layer.cuts:
        result, grads = call(layer, cut, plain, inputs, layer.grad_output[cut], zero_losses)
        add(grads)
        out.output.append(result.output)
        out.x.append(grads.x.astype(np.float64))
        out.router_input.append(None if grads.router_input is None else grads.router_input.astype(np.float64))
        counts, plan = unpack_routing(
            result.routing, len(result.output), config.top_k, config.num_experts, router_dtype(dtype)
        )
        out.topk_idx.append(plan.topk_idx)
        out.kept.append(plan.token_rows >= 0)
        out.counts = out.counts + counts
    dropless = replace(config, capacity_factor=None, max_tokens_per_expert=None)
    scopes = [slice(None)] if loss_scope == "group" else layer.cuts
    # every rank's objective holds the losses: in the sum they count as often
    grad_losses = layer.grad_losses * (ranks if loss_scope == "group" else 1)
    for scope in scopes:
        nothing = np.zeros_like(layer.grad_output[scope])
        result, grads = call(layer, scope, dropless, inputs, nothing, grad_losses.astype(zero_losses.dtype))
        add(grads)
        for rank, cut in enumerate(layer.cuts):
            if loss_scope == "group" or cut is scope:
                within = cut if loss_scope == "group" else slice(None)
                out.losses.append(result.losses)
                out.x[rank] += grads.x[within].astype(np.float64)
                if grads.router_input is not None:
                    out.router_input[rank] += grads.router_input[within].astype(np.float64)
    out.weights = weights
    return out
