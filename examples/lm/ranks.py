"""The processes that train one model together: one, or as many as mpirun started."""

import os

import torch
from torch import Tensor, nn

from ffmoe_core.comm import Step, all_reduced
from ffmoe_torch import clip_grad_norm_, get_dense_params, shard_experts
from ffmoe_torch.communicator import communicator_for

TIMEOUT = 60.0  # seconds that a process waits for another
LAUNCHED = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # what mpirun says: MPICH's, Open MPI's


class Ranks:
    """Every rank holds some of the experts, and trains on its share of each batch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.size = 0, 1
        if any(int(os.environ.get(name, "1")) > 1 for name in LAUNCHED):
            self.comm = communicator_for(None, "auto", TIMEOUT, device)
            self.rank, self.size = self.comm.rank, self.comm.size

    def shard(self, model: nn.Module) -> None:
        """Keep this rank's experts."""
        if self.size > 1:
            shard_experts(model, self.comm)

    def own(self, batch: Tensor) -> Tensor:
        """This rank's rows; their number is a multiple of the ranks."""
        return batch.chunk(self.size)[self.rank]

    def average(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Average the gradients of what all ranks hold, in place; returns the average loss."""
        if self.size == 1:
            return loss
        grads = [parameter.grad for parameter in get_dense_params(model) if parameter.grad is not None]
        flat = torch.cat([*(grad.float().flatten() for grad in grads), loss.detach()[None]])
        flat = all_reduced(self.comm, flat, Step("gradients")) / self.size
        *parts, mean = flat.split([*(grad.numel() for grad in grads), 1])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))
        return mean[0]

    def clip(self, model: nn.Module, max_norm: float) -> None:
        if self.size == 1:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        else:
            clip_grad_norm_(model, max_norm)

    def gather(self, text: str) -> list[str]:
        """Every rank's."""
        return self.comm.gather(text, Step("checkpoint")) if self.size > 1 else [text]

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        if self.size == 1:
            return here
        return all_reduced(self.comm, torch.tensor([int(here)], device=self.device), Step("stop")).item() > 0


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU."""
    return _launched("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", 0)


def local_size() -> int:
    """How many processes there are on this machine."""
    return _launched("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", 1)


def _launched(mpich: str, open_mpi: str, alone: int) -> int:
    return int(os.environ.get(mpich) or os.environ.get(open_mpi) or alone)
