"""Communicators for torch: a process group as transport, its store as the line for notices."""

import ctypes
import functools
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ffmoe_core.arrays import DTYPE_NAMES, Array, DeviceType, Space
from ffmoe_core.comm import Communicator, Control, Step
from ffmoe_core.comm.base import DEFAULT_TIMEOUT, WatchedCommunicator
from ffmoe_core.comm.communicator import Parts
from ffmoe_core.comm.host import row_bytes
from ffmoe_core.errors import CommError, ConfigError, DeviceError

from .store_control import StoreControl

EP_BACKENDS = ("auto", "mpi", "nccl", "torch")


def communicator_for(ep_group: Any, ep_backend: str, timeout: float, device: torch.device) -> Communicator:
    """The communicator of a group, for parameters on ``device``: one for all layers that ask alike.

    ``ep_group`` is a ProcessGroup, an mpi4py communicator, a Communicator (taken as it is), or None: everyone, in
    torch's default group where that was initialized, and else in MPI's COMM_WORLD.
    Every rank of the group calls this in the same order.
    """
    if ep_backend not in EP_BACKENDS:
        known = ", ".join(map(repr, EP_BACKENDS))
        raise ConfigError(f"ep_backend={ep_backend!r} is unknown; known: {known}")
    if hasattr(ep_group, "all_to_all_v"):
        if ep_backend != "auto" or timeout not in (DEFAULT_TIMEOUT, ep_group.timeout):
            raise ConfigError(
                f"ep_backend={ep_backend!r} and ep_timeout={timeout!r} with a Communicator as ep_group: it is one "
                "already, and has a timeout; leave both out"
            )
        return ep_group
    if ep_group is None and ep_backend != "mpi" and dist.is_available() and dist.is_initialized():
        ep_group = dist.group.WORLD
    over_torch = isinstance(ep_group, dist.ProcessGroup)
    if ep_backend == "auto":
        ep_backend = "nccl" if device.type == "cuda" else "torch" if over_torch else "mpi"
    if ep_backend == "torch" and ep_group is None:
        raise ConfigError(
            "ep_backend='torch' needs an ep_group, or torch.distributed.init_process_group before"
        )
    if ep_backend == "torch" and not over_torch:
        raise ConfigError(f"ep_backend='torch' needs a ProcessGroup as ep_group; it is a {_kind(ep_group)}")
    if ep_group is None and int(os.environ.get("WORLD_SIZE", "1")) > 1 and _mpi_ranks() == 1:
        raise ConfigError(
            "this process is one of several without MPI (WORLD_SIZE), and the experts would stay where they are; call "
            "torch.distributed.init_process_group before, or pass an ep_group"
        )
    if not over_torch and ep_group is not None and not hasattr(ep_group, "handle"):
        raise ConfigError(f"ep_group is a {_kind(ep_group)}; pass a ProcessGroup or an mpi4py communicator")
    if ep_backend == "mpi" and over_torch:
        raise ConfigError(
            "ep_backend='mpi' needs an mpi4py communicator as ep_group, or None for COMM_WORLD; it is a "
            f"{_kind(ep_group)}"
        )
    made = _made.setdefault(ep_group, {}) if over_torch else _made_over(ep_group)
    key = (ep_backend, timeout, device)
    if key not in made:
        made[key] = _new(ep_group, ep_backend, timeout, device, f"{len(made)}")
    return made[key]


def _new(ep_group: Any, ep_backend: str, timeout: float, device: torch.device, name: str) -> Communicator:
    over_torch = isinstance(ep_group, dist.ProcessGroup)
    if ep_backend == "torch":
        return TorchCommunicator(ep_group, timeout, name)
    if ep_backend == "mpi":
        from ffmoe_core.comm.mpi import MpiCommunicator

        return MpiCommunicator(ep_group, timeout)
    if device.type != "cuda":
        raise DeviceError(
            f"ep_backend='nccl' needs the layer on a GPU; its parameters are on {device}. Move it before "
            "shard_experts, or use 'mpi' or 'torch'"
        )
    from ffmoe_core.comm.nccl import NcclCommunicator

    control: Control
    if over_torch:
        control = StoreControl(ep_group, name)
    else:
        from ffmoe_core.comm.mpi import MpiControl

        control = MpiControl(ep_group, timeout)
    return NcclCommunicator(control, device_id=device.index, timeout=timeout)


def _mpi_ranks() -> int:
    from ffmoe_core.comm.mpi import MPI

    size: int = MPI.COMM_WORLD.Get_size()
    return size


def _kind(ep_group: Any) -> str:
    return f"{type(ep_group).__module__}.{type(ep_group).__qualname__}"


_Made = dict[tuple[str, float, torch.device], Communicator]
_made: "weakref.WeakKeyDictionary[dist.ProcessGroup, _Made]" = weakref.WeakKeyDictionary()


def _made_over(comm: Any) -> _Made:
    """What was made for an mpi4py communicator, None for COMM_WORLD; it goes with the communicator."""
    from ffmoe_core.comm.mpi import MPI

    comm = MPI.COMM_WORLD if comm is None else comm
    made = comm.Get_attr(_mpi_key())
    if made is None:
        made = {}
        comm.Set_attr(_mpi_key(), made)
    return made


@functools.cache
def _mpi_key() -> int:
    from ffmoe_core.comm.mpi import MPI

    return MPI.Comm.Create_keyval()


class TorchCommunicator(WatchedCommunicator):
    """See ``Communicator``: collectives of a process group, gloo's for host memory or another's that fits.

    Collectives do not tell who is missing; the ranks find out by the notices of those who are not.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float = DEFAULT_TIMEOUT, name: str = "") -> None:
        super().__init__(StoreControl(group, name), timeout)
        # The group is torch's, to be destroyed by destroy_process_group: its threads must not outlive that.
        self._group_ref = weakref.ref(group)

    def all_to_all_v(
        self,
        space: Space,
        parts: Parts,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        step: Step,
    ) -> "TorchTransfer":
        number = self._watch.begin(step)
        works = []
        for send, recv in parts:
            sent_bytes = [count * row_bytes(send) for count in send_counts]
            recv_bytes = [count * row_bytes(recv) for count in recv_counts]
            source, target = as_bytes(send)[: sum(sent_bytes)], as_bytes(recv)
            if self.size == 1:  # gloo leaves a rank's rows to itself out, where there is no other
                target.copy_(source)
                continue
            for first in range(0, len(send_counts), self.size):
                out, come = (sizes[first : first + self.size] for sizes in (sent_bytes, recv_bytes))
                source_part, source = source[: sum(out)], source[sum(out) :]
                target_part, target = target[: sum(come)], target[sum(come) :]
                works.append(
                    dist.all_to_all_single(
                        target_part, source_part, come, out, group=self._group, async_op=True
                    )
                )
        self._count_bytes(parts, send_counts, step)
        return TorchTransfer(self, number, works, parts)

    def all_reduce(self, space: Space, parts: Parts, step: Step) -> "TorchTransfer":
        number = self._watch.begin(step)
        works = []
        for send, recv in parts:
            as_bytes(recv).copy_(as_bytes(send))
            total = as_bytes(recv).view(getattr(torch, DTYPE_NAMES[recv.dtype]))
            works.append(dist.all_reduce(total, group=self._group, async_op=True))
        return TorchTransfer(self, number, works, parts)

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._group_ref()
        if group is None:
            raise CommError("the process group of this communicator was destroyed", (self.rank,))
        return group


class TorchTransfer:
    """See ``Transfer``: collectives under way."""

    def __init__(self, comm: TorchCommunicator, number: int, works: list[Any], keep: Any) -> None:
        self._comm = comm
        self._number = number
        self._works = works
        self._keep = keep
        comm._underway.add(self)

    def wait(self) -> None:
        others = set(self._comm._others)
        self._comm._watch.wait(self._number, lambda: set() if self._over() else others)
        self._comm._underway.discard(self)
        self._keep = None

    def _over(self) -> bool:
        """Whether all are done; one that broke off is not, so that the others are asked who is missing."""
        for work in self._works:
            if not work.is_completed():
                return False
            try:
                work.wait()
            except RuntimeError:
                return False
        return True


class _DeviceMemory:
    """GPU memory as torch can view it."""

    def __init__(self, array: Array) -> None:
        self.__cuda_array_interface__ = {
            "shape": (array.nbytes,),
            "typestr": "|u1",
            "data": (array.ptr, False),
            "version": 3,
        }


def as_bytes(array: Array) -> Tensor:
    """The array's memory as a uint8 tensor [nbytes], without a copy. The array must outlive it."""
    device = "cpu" if array.device_type == DeviceType.CPU else f"cuda:{array.device_id}"
    if array.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if array.device_type == DeviceType.CPU:
        return torch.frombuffer((ctypes.c_uint8 * array.nbytes).from_address(array.ptr), dtype=torch.uint8)
    return torch.as_tensor(_DeviceMemory(array), device=device)
