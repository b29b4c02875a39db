"""fused_moe: the routed experts as a function of tensors; and the checks of its input."""

import torch
from torch import Tensor

from ffmoe_core.errors import ConfigError, DTypeError, LayoutError, ShapeError

from .losses import losses_by_name
from .operators import routed_experts


def fused_moe(
    x: Tensor,
    gate_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    top_k: int,
    *,
    activation: str = "swiglu",
    gating: str = "softmax",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    num_expert_groups: int | None = None,
    topk_groups: int | None = None,
    capacity_factor: float | None = None,
    max_tokens_per_expert: int | None = None,
    allow_dropped_tokens: bool = True,
    drop_policy: str = "position",
    aux_loss_coeff: float = 0.0,
    z_loss_coeff: float = 0.0,
    recompute_activations: bool = False,
    router_input: Tensor | None = None,
    expert_bias: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A routed mixture of GLU experts as a function: ``(output, losses)``, both differentiable.

    Parameters
    ----------
    x : [*, H] float32, float64, bfloat16 or float16, on a CPU or an NVIDIA GPU.
    gate_weight : [E, H], dtype of x or float32.
    w_up : [E, 2I, H], dtype of x; gate rows first, then up rows.
    w_down : [E, H, I], dtype of x.
    top_k : experts a token, 1 to E.
    router_input : [*, H], dtype of x: what the gate reads instead of x.
    expert_bias : [E] float32, added to the scores for the selection only; no gradient.
    valid_mask : [*] bool: False marks a token to ignore; it gets no expert, a zero output and no part in
        the losses.

    The other options are those of ``ffmoe_core.MoEConfig``. Under autocast x, router_input and the weights
    are cast to autocast's dtype; the router computes in float32 all the same (float64 for float64 x).

    Returns
    -------
    output : [*, H], dtype of x.
    losses : "aux_loss" where ``aux_loss_coeff > 0``, "z_loss" where ``z_loss_coeff > 0``: 0-d float32
        (float64 for float64 x), times the coefficient.

    Raises the errors of ``ffmoe_core.moe_forward``, and ConfigError for an option out of range. A second
    derivative, forward-mode derivatives and the transforms of ``torch.func`` raise UnsupportedError.
    """
    if not isinstance(recompute_activations, bool):
        raise ConfigError(f"recompute_activations={recompute_activations!r} must be True or False")
    check_tensor(gate_weight, "gate_weight")
    check_tensor(w_up, "w_up")
    check_tensor(w_down, "w_down")
    if expert_bias is not None:
        check_tensor(expert_bias, "expert_bias")
    if gate_weight.dim() != 2:
        raise ShapeError(f"gate_weight has shape {tuple(gate_weight.shape)}; expected [num_experts, d_model]")
    if w_down.dim() != 3:
        raise ShapeError(
            f"w_down has shape {tuple(w_down.shape)}; expected [num_experts, d_model, ffn_dim // 2]"
        )
    d_model = gate_weight.shape[1]
    options = (
        top_k,
        activation,
        gating,
        norm_topk_prob,
        routed_scaling_factor,
        num_expert_groups,
        topk_groups,
        capacity_factor,
        max_tokens_per_expert,
        allow_dropped_tokens,
        drop_policy,
        aux_loss_coeff,
        z_loss_coeff,
    )
    output, losses, _ = routed_experts(
        as_tokens(x, "x", d_model),
        None if router_input is None else as_tokens(router_input, "router_input", d_model),
        gate_weight,
        w_up,
        w_down,
        expert_bias,
        None if valid_mask is None else as_token_mask(valid_mask, x),
        options,
        None,
        recompute_activations,
    )
    output = output if x.dim() == 2 else output.reshape(x.shape)
    return output, losses_by_name(losses, aux_loss_coeff, z_loss_coeff)


def check_tensor(value: object, name: str) -> None:
    """A torch tensor with strides; DTypeError or LayoutError."""
    if not isinstance(value, Tensor):
        raise DTypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")
    if value.layout is not torch.strided:
        raise LayoutError(
            f"{name} has layout {value.layout}; expected torch.strided: pass a dense or padded tensor"
        )


def as_tokens(x: Tensor, name: str, d_model: int) -> Tensor:
    """x [*, H] as contiguous [T, H]."""
    check_tensor(x, name)
    if x.dim() == 0 or x.shape[-1] != d_model:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; expected [*, d_model] with d_model={d_model}")
    if x.dim() != 2:
        x = x.reshape(-1, d_model)
    return x.contiguous()


def as_token_mask(valid_mask: Tensor, x: Tensor) -> Tensor:
    """valid_mask [*] as contiguous [T], for x [*, H]."""
    check_tensor(valid_mask, "valid_mask")
    if valid_mask.dtype != torch.bool:
        raise DTypeError(f"valid_mask has dtype {valid_mask.dtype}; expected torch.bool")
    if valid_mask.shape != x.shape[:-1]:
        raise ShapeError(
            f"valid_mask has shape {tuple(valid_mask.shape)}; expected that of x without its last dimension, "
            f"{tuple(x.shape[:-1])}"
        )
    return valid_mask.reshape(-1).contiguous()
