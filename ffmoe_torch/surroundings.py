"""What is at work around a call: modes, transforms, autocast and tracers; and what of it cannot work."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ffmoe_core.errors import UnsupportedError

# --- none of it ---

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


# --- what cannot work ---


def refuse_tangents(tensors: tuple[Tensor | None, ...]) -> None:
    """Where nothing is recorded for backward, autograd would drop them without a word."""
    if forward_ad._current_level < 0:
        return
    if torch._C._are_functorch_transforms_active():
        refuse_functorch()
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise no_forward_mode()


def no_forward_mode() -> UnsupportedError:
    return UnsupportedError("ffmoe has no forward-mode derivative; use reverse mode (backward)")


def no_second_derivative() -> UnsupportedError:
    return UnsupportedError(
        "ffmoe has no second derivative: this backward pass goes through the gradient of a MoE layer "
        "(create_graph=True, a gradient penalty or a Hessian)"
    )


def main_grad_unsupported() -> UnsupportedError:
    return UnsupportedError(
        "main_grad=True works in plain eager calls only: not under torch.compile, autocast, torch.func or a "
        "dispatch mode (selective checkpointing is one), not with create_graph=True, and not for fake tensors "
        "or subclasses"
    )


def refuse_functorch(*arguments: Any) -> NoReturn:
    raise UnsupportedError(
        "ffmoe does not work under the transforms of torch.func (vmap, grad, jvp, functionalize, ...); "
        "call it outside of them, and take gradients with torch.autograd"
    )


# --- autocast ---


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
