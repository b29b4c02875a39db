"""The custom operators ``ffmoe::moe`` and ``ffmoe::moe_backward``, and the way past them.

The operators are the boundary to the runtime: each is one call of it, with torch's tensors as they are.
What surrounds them here is what torch needs to know: shapes for tracing, the gradient, autocast, and which
transforms cannot work. Where none of this has a say (``nothing_between``), the runtime is called without the
operators, whose dispatch costs a small layer about as much host time as the runtime.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from ffmoe_core import MoEConfig, MoEGrads, MoEResult, MoESaved, moe_backward, moe_forward, routing_layout
from ffmoe_core.config import needs_logits
from ffmoe_core.errors import ConfigError

from .surroundings import (
    autocast,
    main_grad_unsupported,
    no_forward_mode,
    no_second_derivative,
    nothing_between,
    refuse_functorch,
    refuse_tangents,
)

# --- options ---

# The options of a MoEConfig that travel through an operator, in this order. The widths follow from the
# weights, and recompute_activations is the operator's keep_activations=False.
_OPTIONS = {
    "top_k": "int",
    "activation": "str",
    "gating": "str",
    "norm_topk_prob": "bool",
    "routed_scaling_factor": "float",
    "num_expert_groups": "int?",
    "topk_groups": "int?",
    "capacity_factor": "float?",
    "max_tokens_per_expert": "int?",
    "allow_dropped_tokens": "bool",
    "drop_policy": "str",
    "aux_loss_coeff": "float",
    "z_loss_coeff": "float",
}
_OPTIONS_SCHEMA = ", ".join(f"{kind} {name}" for name, kind in _OPTIONS.items())
_WEIGHTS_SCHEMA = "Tensor x, Tensor? router_input, Tensor gate_weight, Tensor w_up, Tensor w_down"

_NO_SUMS: Mapping[str, Tensor] = {}

Options = tuple[Any, ...]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # output, losses, logits, z, routing


def options_of(config: MoEConfig) -> Options:
    """The options of ``config`` in the operators' order."""
    return tuple(getattr(config, name) for name in _OPTIONS)


# What an option of each kind may be; of an operator's argument torch would make one, or say what its schema is.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "an int"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "True or False"),
    "str": ((str,), "a str"),
}


def _check_kinds(options: Options) -> None:
    for (name, kind), value in zip(_OPTIONS.items(), options, strict=True):
        types, wanted = _KINDS[kind.removesuffix("?")]
        if value is None and kind.endswith("?"):
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
            raise ConfigError(f"{name}={value!r} must be {wanted}{' or None' if kind.endswith('?') else ''}")


# --- a call ---


def routed_experts(
    x: Tensor,
    router_input: Tensor | None,
    gate_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    expert_bias: Tensor | None,
    valid_mask: Tensor | None,
    options: Options,
    config: MoEConfig | None,
    recompute_activations: bool,
    weight_sums: Mapping[str, Tensor] = _NO_SUMS,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, losses, routing) of ``ffmoe::moe`` for x [T, H].

    ``config`` is what ``options`` say together with the weights' shapes, None to look it up. Activations are
    kept only where a backward can follow and wants them. ``weight_sums`` are the arguments ``w_up_grad`` and
    ``w_down_grad`` of ``moe_backward``, for those of the weights whose gradients are to go there.
    """
    tensors = (x, router_input, gate_weight, w_up, w_down, expert_bias, valid_mask)
    refuse_tangents(tensors)
    recording = torch.is_grad_enabled() and (
        x.requires_grad
        or w_up.requires_grad
        or w_down.requires_grad
        or gate_weight.requires_grad
        or (router_input is not None and router_input.requires_grad)
    )
    keep_activations = recording and not recompute_activations
    if not nothing_between(tensors):
        if weight_sums:
            raise main_grad_unsupported()
        if config is None:
            _check_kinds(options)
        output, losses, _, _, routing = _moe(*tensors, *options, keep_activations)
        return output, losses, routing
    if config is None:
        config = _config_for(gate_weight, w_down, options, not recompute_activations)
    if recording:
        output, losses, (routing,) = _apply((config, options, weight_sums), *tensors)
        return output, losses, routing
    result = _forward(config, False, *tensors)
    return result.output, result.losses, result.routing


# --- the operators ---

_library = torch.library.Library("ffmoe", "DEF")
# needs_exact_strides: the runtime takes contiguous arrays, and a compiler must not hand it others.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_library.define(
    f"moe({_WEIGHTS_SCHEMA}, Tensor? expert_bias, Tensor? valid_mask, {_OPTIONS_SCHEMA}, "
    "bool keep_activations) -> (Tensor output, Tensor losses, Tensor logits, Tensor z, Tensor routing)",
    tags=_TAGS,
)
_library.define(
    f"moe_backward(Tensor grad_output, Tensor? grad_losses, {_WEIGHTS_SCHEMA}, Tensor? logits, Tensor? z, "
    f"Tensor routing, {_OPTIONS_SCHEMA}) -> "
    "(Tensor dx, Tensor d_router_input, Tensor d_gate_weight, Tensor dw_up, Tensor dw_down)",
    tags=_TAGS,
)
_moe = torch.ops.ffmoe.moe.default
_moe_backward = torch.ops.ffmoe.moe_backward.default


@lru_cache(maxsize=256, typed=True)  # 2.0 is no top_k, though it equals 2
def _config(
    d_model: int, intermediate: int, num_experts: int, keep_activations: bool, *options: Any
) -> MoEConfig:
    return MoEConfig(
        d_model=d_model,
        ffn_dim=2 * intermediate,
        num_experts=num_experts,
        recompute_activations=not keep_activations,
        **dict(zip(_OPTIONS, options, strict=True)),
    )


def _config_for(
    gate_weight: Tensor, w_down: Tensor, options: Options, keep_activations: bool = True
) -> MoEConfig:
    num_experts, d_model = gate_weight.shape
    try:
        return _config(d_model, w_down.shape[2], num_experts, keep_activations, *options)
    except TypeError:  # something that has no hash is no option of any kind
        _check_kinds(options)
        raise


def _keeps_logits(options: Sequence[Any]) -> bool:
    """``MoEConfig.keeps_logits`` from the options alone: sizes may be symbolic, which makes no config."""
    named = dict(zip(_OPTIONS, options, strict=True))
    decisive = ("gating", "norm_topk_prob", "aux_loss_coeff", "z_loss_coeff")
    return needs_logits(*(named[name] for name in decisive))


def _forward(
    config: MoEConfig,
    save_for_backward: bool,
    x: Tensor,
    router_input: Tensor | None,
    gate_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    expert_bias: Tensor | None,
    valid_mask: Tensor | None,
) -> MoEResult:
    return moe_forward(
        x,
        gate_weight,
        w_up,
        w_down,
        config,
        router_input=router_input,
        expert_bias=expert_bias,
        valid_mask=valid_mask,
        save_for_backward=save_for_backward,
    )


def _backward(
    config: MoEConfig,
    weight_sums: Mapping[str, Tensor],
    grad_output: Tensor,
    grad_losses: Tensor | None,
    x: Tensor,
    router_input: Tensor | None,
    gate_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    logits: Tensor | None,
    z: Tensor | None,
    routing: Tensor,
) -> MoEGrads:
    return moe_backward(
        grad_output,
        MoESaved(logits, z, routing),
        x,
        gate_weight,
        w_up,
        w_down,
        config,
        router_input=router_input,
        grad_losses=grad_losses,
        **weight_sums,
    )


def _run_moe(*arguments: Any) -> Outputs:
    tensors, options, keep_activations = arguments[:7], arguments[7:-1], arguments[-1]
    config = _config_for(tensors[2], tensors[4], options, keep_activations)
    result = _forward(config, True, *tensors)
    assert result.saved is not None
    logits, z, routing = result.saved
    return (
        result.output,
        result.losses,
        result.losses.new_empty(0) if logits is None else logits,
        result.output.new_empty(0) if z is None else z,
        routing,
    )


def _run_moe_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors, options = arguments[:10], arguments[10:]
    dx, d_router_input, *rest = _backward(_config_for(tensors[4], tensors[6], options), _NO_SUMS, *tensors)
    return dx, dx.new_empty(0) if d_router_input is None else d_router_input, *rest


for _device in ("CPU", "CUDA"):
    _library.impl("moe", _run_moe, _device)
    _library.impl("moe_backward", _run_moe_backward, _device)


# --- shapes, for tracing ---


@torch.library.register_fake("ffmoe::moe", lib=_library)
def _fake_moe(
    x: Tensor,
    router_input: Tensor | None,
    gate_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    expert_bias: Tensor | None,
    valid_mask: Tensor | None,
    top_k: int,
    *arguments: Any,
) -> Outputs:
    num_tokens, num_experts, ffn_dim = x.shape[0], gate_weight.shape[0], 2 * w_down.shape[2]
    router_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # around the cache: the number of tokens may be symbolic, which has no hash
    layout = routing_layout.__wrapped__(
        num_tokens, top_k, num_experts, "float64" if x.dtype == torch.float64 else "float32"
    )
    *options, keep_activations = top_k, *arguments
    return (
        torch.empty_like(x),
        x.new_empty(3, dtype=router_dtype),
        x.new_empty((num_tokens, num_experts) if _keeps_logits(options) else 0, dtype=router_dtype),
        x.new_empty(num_tokens * top_k, ffn_dim) if keep_activations else x.new_empty(0),
        x.new_empty(layout.nbytes, dtype=torch.uint8),
    )


@torch.library.register_fake("ffmoe::moe_backward", lib=_library)
def _fake_moe_backward(
    grad_output: Tensor,
    grad_losses: Tensor | None,
    x: Tensor,
    router_input: Tensor | None,
    gate_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        x.new_empty(0) if router_input is None else torch.empty_like(router_input),
        torch.empty_like(gate_weight),
        torch.empty_like(w_up),
        torch.empty_like(w_down),
    )


# --- gradients ---
# torch.library.register_autograd would do, but for operators with this many options it spends 100 us of host
# time a call on filling in the schema's defaults; these are the same registrations without that.


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], *tensors: Tensor | None) -> Outputs:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: Outputs = _moe(*tensors, *rest)
        *options, keep_activations = rest
        _, _, logits, z, routing = outputs
        ctx.save_for_backward(
            *tensors[:5],
            logits if _keeps_logits(options) else None,
            z if keep_activations else None,
            routing,
        )
        ctx.config, ctx.options, ctx.weight_sums = None, options, _NO_SUMS
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logits, z, routing)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_losses, *_ = grads
        saved = ctx.saved_tensors
        grad_output = torch.zeros_like(saved[0]) if grad_output is None else grad_output.contiguous()
        grad_losses = None if grad_losses is None else grad_losses.contiguous()
        # with the gradient's own graph (create_graph) the operator is there to refuse a second derivative
        if ctx.config is not None and not torch.is_grad_enabled() and nothing_between((grad_output, *saved)):
            gradients = _backward(ctx.config, ctx.weight_sums, grad_output, grad_losses, *saved)
            return None, *gradients, None, None
        if ctx.weight_sums:
            raise main_grad_unsupported()
        gradients = _moe_backward(grad_output, grad_losses, *saved, *ctx.options)
        wanted = ctx.needs_input_grad[1:]
        return None, *(g if w else None for g, w in zip(gradients, wanted, strict=False)), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise no_forward_mode()


class _StraightMoE(_MoE):
    """Without the operator, and without its outputs that only backward needs."""

    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], *tensors: Any) -> Any:
        ctx.config, ctx.options, ctx.weight_sums = rest
        output, losses, routing, saved = _forward(ctx.config, True, *tensors)
        assert saved is not None
        ctx.save_for_backward(*tensors[:5], *saved)
        ctx.set_materialize_grads(False)
        if ctx.config.aux_loss_coeff == 0 and ctx.config.z_loss_coeff == 0:
            ctx.mark_non_differentiable(losses)
        return output, losses, (routing,)


# Function.apply() is this and, before it, a look at every argument for torch.func's sake.
_apply = super(torch.autograd.Function, _StraightMoE).apply


class _MoEBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: Options, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = _moe_backward(*tensors, *rest)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise no_second_derivative()


def _differentiable(
    operator: Any, function: type[torch.autograd.Function], num_tensors: int
) -> Callable[..., Any]:
    """The autograd kernel of an operator whose first ``num_tensors`` arguments are tensors or None."""

    def dispatch(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in arguments[:num_tensors]
        ):
            # what has no gradient goes as one argument: apply() looks at each
            return function.apply(arguments[num_tensors:], *arguments[:num_tensors])
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return dispatch


_library.impl("moe", _differentiable(_moe, _MoE, 7), "Autograd")
_library.impl("moe_backward", _differentiable(_moe_backward, _MoEBackward, 10), "Autograd")


# --- autocast, and what cannot work ---


def _autocasting(device_type: str) -> Callable[..., Outputs]:
    def dispatch(*arguments: Any) -> Outputs:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            outputs: Outputs = _moe(*(autocast(tensor, dtype) for tensor in arguments[:5]), *arguments[5:])
        return outputs

    return dispatch


_library.impl("moe", _autocasting("cpu"), "AutocastCPU")
_library.impl("moe", _autocasting("cuda"), "AutocastCUDA")


for _name in ("moe", "moe_backward"):
    _library.impl(_name, refuse_functorch, "FuncTorchDynamicLayerFrontMode")
