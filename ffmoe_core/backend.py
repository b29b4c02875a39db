"""The Backend protocol: the stages of a layer. And which backend an array's device calls for."""

from collections.abc import Callable
from functools import cache
from typing import Protocol

from .arrays import DeviceType, Space

Stage = Callable[..., None]


class Backend(Protocol):
    """One implementation of every stage.

    A stage takes the Space first, then Arrays that were checked before, and fills its outputs entirely.
    It never waits for the device, and gives the same bits every time. Both backends have the same
    signatures.
    """

    name: str
    # routing
    gate_logits: Stage
    route: Stage
    route_and_sort: Stage  # what `route` and `sort` do, in fewer launches
    router_losses: Stage
    # The logits' gradient [T, E], or where config.sparse_gradient that of the chosen experts' [T, K].
    route_backward: Stage
    # With topk_idx it takes the latter. One of its two outputs may be None: then it is left out.
    gate_backward: Stage
    # rows
    sort: Stage
    permute: Stage
    combine: Stage
    # one number everywhere: int32, float32 or float64
    fill: Stage
    # experts on many ranks
    dispatch_ranks: Stage
    dispatch_slots: Stage
    # grouped products
    grouped_gemm: Stage
    grouped_gemm_wgrad: Stage
    grouped_glu: Stage
    grouped_glu_backward: Stage


STAGES = tuple(name for name in Backend.__annotations__ if name != "name")


def backend_for(space: Space) -> type[Backend]:
    """The backend of the device that ``space`` allocates on."""
    return _backend_of(space.device_type)


@cache
def _backend_of(device_type: int) -> type[Backend]:
    if device_type == DeviceType.CPU:
        from .cpu.backend import CpuBackend

        return CpuBackend
    from .cuda.backend import CudaBackend

    return CudaBackend
