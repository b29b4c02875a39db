"""Models whose experts are spread over ranks: whose parameter is whose, and norms of all."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ffmoe_core.comm import Communicator, Step, all_reduced

from .layer import MoELayer


def shard_experts(model: nn.Module, ep_group: Any = None, ep_backend: str = "auto", **options: Any) -> None:
    """``MoELayer.shard_experts`` of every layer in ``model``, each named as in ``named_modules()``."""
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            module.shard_experts(ep_group, ep_backend, **{"name": name or "MoELayer", **options})


def get_dense_params(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` that every rank holds alike: all but ``MoELayer.expert_params``."""
    expert = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, MoELayer)
        for parameter in module.expert_params
    }
    return [parameter for parameter in model.parameters() if id(parameter) not in expert]


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` as if one process held it all, on the CPU and the same on every rank.

    Every rank that holds a part, of experts or of DTensors (FSDP2), calls it together. ``load_state_dict`` of a model
    with any number of ranks, or none, takes it: a sharded layer picks its own experts.
    """
    state = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if _is_dtensor(value) else value
        state[name] = whole.cpu() if isinstance(whole, Tensor) else whole
    for name, module in model.named_modules():
        if isinstance(module, MoELayer) and module._sharded is not None:
            prefix = f"{name}." if name else ""
            for weights, values in module._sharded.gather(w_up=module.w_up, w_down=module.w_down).items():
                state[prefix + weights] = values
    return state


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients so that their 2-norm, over all ranks' experts, is at most ``max_norm``.

    Every rank of the layers' groups calls it together, after the dense gradients were reduced, and gets the same
    norm: that of the model with all its experts in one place. As ``torch.nn.utils.clip_grad_norm_``, which does not
    know that the ranks hold different experts. A gradient is the parameter's ``grad``, a DTensor (FSDP2) too, or
    where that is None its ``main_grad``.

    Returns the norm before, a 0-d float64 tensor.
    """
    sharded: dict[Communicator, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, MoELayer) and module._sharded is not None:
            sharded.setdefault(module._sharded.comm, []).extend(module.expert_params)
    spread = {id(parameter) for parameters in sharded.values() for parameter in parameters}
    common = [parameter for parameter in model.parameters() if id(parameter) not in spread]
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    by_groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for gradient in _gradients(common):
        by_groups.setdefault(_groups_of(gradient), []).append(gradient)
    for groups, gradients in by_groups.items():
        square = _square(gradients, device)
        for group in groups:
            dist.all_reduce(square, group=group)
        total += square
    for comm, parameters in sharded.items():
        square = _square(_gradients(parameters), device)
        total += all_reduced(comm, square[None], Step("gradient norm"))[0]
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in _gradients(model.parameters()):
        _local(gradient).mul_(scale.to(gradient.dtype))
    return norm


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    found = [
        getattr(parameter, "main_grad", None) if parameter.grad is None else parameter.grad
        for parameter in parameters
    ]
    return [gradient for gradient in found if gradient is not None]


def _is_dtensor(value: Any) -> bool:
    return hasattr(value, "placements")  # to import the class takes half a second


def _groups_of(gradient: Any) -> tuple[Any, ...]:
    """The process groups over which a DTensor is spread; of any other tensor every rank has all."""
    if not _is_dtensor(gradient):
        return ()
    spread = [dim for dim, placement in enumerate(gradient.placements) if placement.is_shard()]
    return tuple(gradient.device_mesh.get_group(dim) for dim in spread)


def _local(gradient: Any) -> Tensor:
    """What this rank has of it."""
    local: Tensor = gradient.to_local() if _is_dtensor(gradient) else gradient
    return local


def _square(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The sum of the gradients' squares on this rank, in float64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients:
        total += torch.linalg.vector_norm(_local(gradient), dtype=torch.float64).square()
    return total
