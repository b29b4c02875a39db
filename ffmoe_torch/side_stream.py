"""A stream beside another, its origin, on which work can run that the origin waits for later.

Memory that is allocated on it can be let go of while its origin still reads it, and is then given out for other work
on it. torch's ``record_stream`` would put that off, but does nothing for memory that comes through DLPack, as the
runtime's does. So all work on a stream beside another begins after what its origin has by then, in forward and in
backward.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


def side_stream_of(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream beside ``stream``, the current one: always the same, and nobody else's, as torch's own may become.

    While a CUDA graph is captured it is one of torch's, as CUDA may refuse to make another; memory is the graph's then.
    """
    if torch.cuda.is_current_stream_capturing():
        return _torchs_stream(stream)
    return torch.cuda.ExternalStream(_own_stream(stream).ptr, device=stream.device)


@cache
def _torchs_stream(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(stream.device)


@cache
def _own_stream(stream: torch.cuda.Stream) -> Any:
    import cupy

    with cupy.cuda.Device(stream.device.index):
        return cupy.cuda.Stream(non_blocking=True)


def beside(side: torch.cuda.Stream | None, function: Callable[..., _T], *tensors: torch.Tensor) -> _T:
    """``function(*tensors)`` on a stream beside the current one, or where it is None on that itself.

    The tensors may be let go of at once.
    """
    if side is None:
        return function(*tensors)
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        result = function(*tensors)
    for tensor in tensors:
        tensor.record_stream(side)
    return result


def after(origin: torch.cuda.Stream | None) -> None:
    """For backward of what ran beside ``origin``, which autograd runs there, too: on the current stream."""
    if origin is not None:
        torch.cuda.current_stream(origin.device).wait_stream(origin)
