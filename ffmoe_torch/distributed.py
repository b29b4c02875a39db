"""Models whose experts are spread over ranks: whose parameter is whose, and norms of all."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ffmoe_core.comm import Communicator, Step, all_reduced
from ffmoe_core.errors import ConfigError
from ffmoe_core.expert_parallel import aborting

from .layer import MoELayer
from .sharded import ShardedExperts


def shard_experts(model: nn.Module, ep_group: Any = None, ep_backend: str = "auto", **options: Any) -> None:
    """``MoELayer.shard_experts`` of every layer in ``model``, each named as in ``named_modules()``."""
    _check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            module.shard_experts(ep_group, ep_backend, **{"name": name or "MoELayer", **options})


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; expected the nn.Module that holds the layers")


def get_dense_params(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` that every rank holds alike: all but ``MoELayer.expert_params``."""
    _check_model(model)
    expert = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, MoELayer)
        for parameter in module.expert_params
    }
    return [parameter for parameter in model.parameters() if id(parameter) not in expert]


def ddp_ignored(model: nn.Module) -> list[str]:
    """Names of what DDP has to leave alone where experts are spread over ranks.

    These are ``MoELayer.expert_params``, which ranks hold different ones of, and ``expert_counts``, of which DDP would
    give every rank those of the first. For ``DistributedDataParallel._set_params_and_buffers_to_ignore_for_model``,
    after ``shard_experts``: of layers that are not sharded DDP has to average the experts' gradients, too.
    """
    ignored = {
        id(tensor)
        for layer in sharded_layers(model)
        for tensor in (*layer.expert_params, layer.expert_counts)
    }
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = [name for name, tensor in every if id(tensor) in ignored]
    # In one place DDP joins the names of a module and of its parameter by a dot even where the first is empty.
    return names + [f".{name}" for name in names if "." not in name]


class _Place(NamedTuple):
    """Stands in a state dict for weights that are to be gathered."""

    layer: MoELayer
    weights: str


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` as if one process held it all, on the CPU and the same on every rank.

    Every rank that holds a part, of experts or of DTensors (FSDP2), calls it together. ``load_state_dict`` of a model
    with any number of ranks, or none, takes it: a sharded layer picks its own experts.
    """
    layers = sharded_layers(model)
    with expert_weights_as(_Place, layers):
        own = model.state_dict()
    gathered = {
        layer: sharded.gather(w_up=layer.w_up, w_down=layer.w_down) for layer, sharded in layers.items()
    }
    state = {}
    for name, value in own.items():
        if isinstance(value, _Place):
            value = gathered[value.layer][value.weights]
        elif _is_dtensor(value):
            value = value.full_tensor()
        state[name] = value.cpu() if isinstance(value, Tensor) else value
    return state


def sharded_layers(model: nn.Module) -> dict[MoELayer, ShardedExperts]:
    """The layers of ``model`` whose experts are spread over ranks: each once, in the same order on every rank."""
    return {
        module: module._sharded
        for module in model.modules()
        if isinstance(module, MoELayer) and module._sharded is not None
    }


@contextmanager
def expert_weights_as(value: Callable[[MoELayer, str], Any], layers: Iterable[MoELayer]) -> Iterator[None]:
    """Within it, a state dict holds ``value(layer, "w_up")`` and the same of ``w_down`` for each of the layers.

    Whatever their keys: a layer may have several names, and wrappers around it may have it saved under others.
    """

    def replace(layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for weights in ("w_up", "w_down"):
            state_dict[prefix + weights] = value(layer, weights)

    handles = [layer.register_state_dict_post_hook(replace) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients so that their 2-norm, over all ranks' experts, is at most ``max_norm``.

    Every rank of the layers' groups calls it together, after the dense gradients were reduced, and gets the same
    norm: that of the model with all its experts in one place. As ``torch.nn.utils.clip_grad_norm_``, which does not
    know that the ranks hold different experts. A gradient is the parameter's ``grad``, a DTensor (FSDP2) too, or
    where that is None its ``main_grad``.

    Returns the norm before, a 0-d float64 tensor.

    Raises ConfigError for a ``max_norm`` that is not a number of at least 0. Infinity asks for the norm alone.
    """
    _check_model(model)
    sharded: dict[Communicator, list[nn.Parameter]] = {}
    for layer, experts in sharded_layers(model).items():
        sharded.setdefault(experts.comm, []).extend(layer.expert_params)
    with ExitStack() as telling:
        for comm in sharded:
            telling.enter_context(aborting(comm))
        if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not max_norm >= 0:
            raise ConfigError(f"max_norm={max_norm!r} must be a number of at least 0")
    spread = {id(parameter) for parameters in sharded.values() for parameter in parameters}
    common = [parameter for parameter in model.parameters() if id(parameter) not in spread]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
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
