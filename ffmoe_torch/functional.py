"""fused_moe, and the custom operators ``ffmoe::moe`` and ``ffmoe::moe_backward`` it is made of.

The operators are the boundary to the runtime: each is one call of it, with torch's tensors as they are.
What surrounds them here is what torch needs to know: shapes for tracing, the gradient, autocast, and which
transforms cannot work. Where none of this has a say (``nothing_between``), the runtime is called without the
operators, whose dispatch costs a small layer about as much host time as the runtime.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ffmoe_core import MoEConfig, MoEGrads, MoEResult, MoESaved, moe_backward, moe_forward, routing_layout
from ffmoe_core.config import needs_logits
from ffmoe_core.errors import ConfigError, DTypeError, LayoutError, ShapeError, UnsupportedError

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
    _check_kinds(options)
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
            raise _main_grad_unsupported()
        output, losses, _, _, routing = _moe(*tensors, *options, keep_activations)
        return output, losses, routing
    if config is None:
        config = _config_for(gate_weight, w_down, options, not recompute_activations)
    if recording:
        output, losses, (routing,) = _apply((config, options, weight_sums), *tensors)
        return output, losses, routing
    result = _forward(config, False, *tensors)
    return result.output, result.losses, result.routing


_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_local_exclude_set
_graph_task = torch._C._current_graph_task_id  # negative where no backward is running

Keys = tuple[int, int]


def _dispatch_keys() -> Keys:
    """What the dispatcher puts before and leaves out of every call on this thread."""
    return _included().raw_repr(), _excluded().raw_repr()


def _keys_in_forward() -> frozenset[Keys]:
    seen = [_dispatch_keys()]
    with torch.inference_mode():
        seen.append(_dispatch_keys())
    return frozenset(seen)


class _KeysInBackward(torch.autograd.Function):
    """Notes the keys that a backward finds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Keys]) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(_dispatch_keys())
        return grads[0], None


def _on_a_fresh_thread(function: Callable[[], frozenset[Keys]]) -> frozenset[Keys]:
    """As keys are where nobody has switched on anything: this thread may be under some mode right now."""
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(function).result()


@cache
def _more_keys_in_backward() -> frozenset[Keys]:
    """Some versions of torch leave out more there. Not asked for before the first backward, which starts autograd's
    threads: a process that has them cannot fork any more."""

    def keys() -> frozenset[Keys]:
        seen: list[Keys] = []
        _KeysInBackward.apply(torch.zeros((), device="cpu", requires_grad=True), seen).backward()
        return frozenset(seen)

    return _on_a_fresh_thread(keys)


_UNDISTURBED = _on_a_fresh_thread(_keys_in_forward)
_ORDINARY = frozenset((Tensor, torch.nn.Parameter, type(None)))


def nothing_between(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call on ``tensors``, the first of which is one, needs the runtime and autograd alone.

    No compiler, mode, transform, autocast or tracer is at work on this thread, and the tensors are neither of
    a subclass nor without memory. All of these see a call only if it is one of an operator.
    """
    if torch.compiler.is_compiling():
        return False
    x: Any = tensors[0]
    keys = _dispatch_keys()
    return (
        (x.is_cuda or x.is_cpu)
        and (keys in _UNDISTURBED or (_graph_task() >= 0 and keys in _more_keys_in_backward()))
        and _ORDINARY.issuperset(map(type, tensors))
    )


def refuse_tangents(tensors: tuple[Tensor | None, ...]) -> None:
    """Where nothing is recorded for backward, autograd would drop them without a word."""
    if forward_ad._current_level < 0:
        return
    if torch._C._are_functorch_transforms_active():
        refuse_functorch()
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise _no_forward_mode()


def _no_forward_mode() -> UnsupportedError:
    return UnsupportedError("ffmoe has no forward-mode derivative; use reverse mode (backward)")


def no_second_derivative() -> UnsupportedError:
    return UnsupportedError(
        "ffmoe has no second derivative: this backward pass goes through the gradient of a MoE layer "
        "(create_graph=True, a gradient penalty or a Hessian)"
    )


def _main_grad_unsupported() -> UnsupportedError:
    return UnsupportedError(
        "main_grad=True works in plain eager calls only: not under torch.compile, autocast, torch.func or a "
        "dispatch mode (selective checkpointing is one), not with create_graph=True, and not for fake tensors "
        "or subclasses"
    )


def losses_by_name(losses: Tensor, aux_loss_coeff: float, z_loss_coeff: float) -> dict[str, Tensor]:
    """The losses that have a coefficient, as 0-d tensors."""
    named = {}
    if aux_loss_coeff > 0:
        named["aux_loss"] = losses[0]
    if z_loss_coeff > 0:
        named["z_loss"] = losses[1]
    return named


class InjectLosses(torch.autograd.Function):
    """Passes ``output`` through, and gives every loss the gradient 1 in backward.

    What ``(loss + sum(losses)).backward()`` does, without the losses having to reach the training loop. ``output``
    itself comes out, not a view, which torch would let nobody change in place. A compiler that follows this wants a
    view; where it begins anew behind this it must not find one, as it makes views again without their Function.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, losses: Tensor) -> Tensor:
        ctx.save_for_backward(losses)
        if torch.compiler.is_compiling():
            return output.view_as(output)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (losses,) = ctx.saved_tensors
        return grads[0], torch.ones_like(losses)


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
    return _config(d_model, w_down.shape[2], num_experts, keep_activations, *options)


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
            raise _main_grad_unsupported()
        gradients = _moe_backward(grad_output, grad_losses, *saved, *ctx.options)
        wanted = ctx.needs_input_grad[1:]
        return None, *(g if w else None for g, w in zip(gradients, wanted, strict=False)), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise _no_forward_mode()


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


def autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor as autocast to ``dtype`` has it: float64 and what are no floating-point numbers stay."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def autocast_all(*tensors: Any) -> tuple[Any, ...]:
    """Cast to autocast's dtype, where it is on."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(autocast(tensor, dtype) for tensor in tensors)


def _autocasting(device_type: str) -> Callable[..., Outputs]:
    def dispatch(*arguments: Any) -> Outputs:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            outputs: Outputs = _moe(*(autocast(tensor, dtype) for tensor in arguments[:5]), *arguments[5:])
        return outputs

    return dispatch


_library.impl("moe", _autocasting("cpu"), "AutocastCPU")
_library.impl("moe", _autocasting("cuda"), "AutocastCUDA")


def refuse_functorch(*arguments: Any) -> NoReturn:
    raise UnsupportedError(
        "ffmoe does not work under the transforms of torch.func (vmap, grad, jvp, functionalize, ...); "
        "call it outside of them, and take gradients with torch.autograd"
    )


for _name in ("moe", "moe_backward"):
    _library.impl(_name, refuse_functorch, "FuncTorchDynamicLayerFrontMode")
