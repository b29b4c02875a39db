"""Models whose experts are spread over ranks: whose parameter is whose, and norms of all."""

from typing import Any

import torch
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
    """``model.state_dict()`` as if one process held all experts, on the CPU and the same on every rank.

    Every rank of the layers' groups calls it together. ``load_state_dict`` of a model with any number of ranks, or
    none, takes it: a sharded layer picks its own experts.
    """
    state = {
        name: value.cpu() if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }
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
    know that the ranks hold different experts.

    Returns the norm before, a 0-d float64 tensor.
    """
    sharded: dict[Communicator, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, MoELayer) and module._sharded is not None:
            sharded.setdefault(module._sharded.comm, []).extend(module.expert_params)
    spread = {id(parameter) for parameters in sharded.values() for parameter in parameters}
    common = [parameter for parameter in model.parameters() if id(parameter) not in spread]
    total = _square(common, model)
    for comm, parameters in sharded.items():
        own = _square(parameters, model)
        total = total + all_reduced(comm, own[None], Step("gradient norm"))[0]
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale.to(parameter.grad.dtype))
    return norm


def _square(parameters: list[nn.Parameter], model: nn.Module) -> Tensor:
    """The sum of the gradients' squares, in float64."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters:
        if parameter.grad is not None:
            total += torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).square()
    return total
