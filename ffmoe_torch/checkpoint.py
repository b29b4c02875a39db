"""Checkpoints by ``torch.distributed.checkpoint`` of models whose experts are spread over ranks.

It cuts and joins what ranks hold of a tensor, and only needs to be told which part that is. A DTensor's ``Shard(0)``
stands for parts as torch cuts them: 5 experts over 4 ranks are 2, 2, 1 and none, where ``expert_range`` makes them
2, 1, 1 and 1. So an ``ExpertShard`` says by itself which experts it has.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils._pytree import tree_map_only

from ffmoe_core.errors import UnsupportedError

from .distributed import expert_weights_as, sharded_layers
from .layer import MoELayer


class ExpertShard(torch.Tensor):
    """A tensor [num_experts, ...] of which this rank holds a run of experts.

    It is there to be saved and loaded, and operations do not work on it. The methods with underscores are those that
    ``torch.distributed.checkpoint`` looks for.

    Attributes
    ----------
    experts : the tensor [experts of this rank, ...] that it was made of.
    first : the number of the first of them.
    """

    experts: Tensor
    first: int

    @staticmethod
    def __new__(cls, experts: Tensor, first: int, num_experts: int) -> "ExpertShard":
        shape = (num_experts, *experts.shape[1:])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=experts.dtype, device=experts.device)

    def __init__(self, experts: Tensor, first: int, num_experts: int) -> None:
        self.experts, self.first = experts.detach(), first

    def like(self, experts: Tensor) -> "ExpertShard":
        """Other values of the same experts."""
        return ExpertShard(experts, self.first, len(self))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.new_empty.default:  # by async_save, which then fills in the attributes
            return args[0].like(args[0].experts.new_empty(args[0].experts.shape, **(kwargs or {})))
        raise UnsupportedError(f"an ExpertShard is to be saved and loaded; {function} does not work on it")

    def __repr__(self) -> str:  # type: ignore[override]
        last = self.first + len(self.experts) - 1
        return f"ExpertShard({self.first} to {last} of {len(self)} experts: {self.experts})"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        offsets = (self.first, *[0] * (self.dim() - 1))
        return [ChunkStorageMetadata(torch.Size(offsets), self.experts.shape)]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        (chunk,) = self.__create_chunk_list__()
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.experts), self.shape)
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.experts


class ShardedState(Stateful):
    """What ``torch.distributed.checkpoint`` (dcp) is to save and load of a model in training, and of its optimizer.

        dcp.save({"training": ShardedState(model, optimizer)}, checkpoint_id=folder)
        dcp.load({"training": ShardedState(model, optimizer)}, checkpoint_id=folder)

    To be made after ``shard_experts``, DDP or ``fully_shard``. Every rank writes its own experts and their optimizer
    state; a checkpoint loads with any other number of ranks, groups and replicas, or in one process.

    Parameters
    ----------
    model : any module, with its ``MoELayer`` sharded or not, within DDP or FSDP2 or not.
    optimizer : its optimizer, of which all state that belongs to single experts has them as its first dimension,
        as that of torch's optimizers has.

    Raises
    ------
    UnsupportedError : from ``state_dict``: an optimizer keeps state of another shape for experts; ranks without
        torch.distributed, which does the saving, hold different experts (``full_state_dict`` is for these).
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Entries "model" and "optimizer", in the memory they are in; what is of experts as ``ExpertShard``."""
        with _experts_as_shards(self.model):
            model = get_model_state_dict(self.model)
        state: dict[str, Any] = {"model": model}
        if self.optimizer is not None:
            optimizer: Any = get_optimizer_state_dict(self.model, self.optimizer)
            for name, value in model.items():
                if isinstance(value, ExpertShard) and name in optimizer["state"]:
                    optimizer["state"][name] = _state_of_shard(name, value, optimizer["state"][name])
            state["optimizer"] = optimizer
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave and a checkpoint has filled since."""
        state = tree_map_only(ExpertShard, lambda shard: shard.experts, state_dict)
        set_model_state_dict(self.model, state["model"])
        if self.optimizer is not None:
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])


def _experts_as_shards(model: nn.Module) -> AbstractContextManager[None]:
    """Within it, state dicts of ``model`` tell of a rank's experts which they are."""
    layers = {layer: experts for layer, experts in sharded_layers(model).items() if experts.comm.size > 1}
    if layers and not dist.is_initialized():
        raise UnsupportedError(
            "the experts are spread over ranks, but torch.distributed, which saves and loads checkpoints, was not "
            "initialized; initialize it, or gather all experts with full_state_dict"
        )

    def shard(layer: MoELayer, weights: str) -> ExpertShard:
        first = layers[layer].expert_parallel.experts.start
        return ExpertShard(getattr(layer, weights), first, layer.num_experts)

    return expert_weights_as(shard, layers)


def _state_of_shard(name: str, parameter: ExpertShard, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state of one parameter; 0-d tensors and numbers are of the parameter as a whole."""
    marked = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            if value.dim() != parameter.dim() or len(value) != len(parameter.experts):
                raise UnsupportedError(
                    f"the optimizer's {key} of {name} has shape {tuple(value.shape)}, which does not tell what of "
                    f"it belongs to which of the {len(parameter.experts)} experts"
                )
            value = parameter.like(value)
        marked[key] = value
    return marked
