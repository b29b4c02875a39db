"""A stream beside another, on which work can run that the other waits for later."""

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
        return torch.cuda.Stream(stream.device)
    return torch.cuda.ExternalStream(_own_stream(stream).ptr, device=stream.device)


@cache
def _own_stream(stream: torch.cuda.Stream) -> Any:
    import cupy

    with cupy.cuda.Device(stream.device.index):
        return cupy.cuda.Stream(non_blocking=True)


def beside(side: torch.cuda.Stream | None, function: Callable[..., _T], *tensors: torch.Tensor) -> _T:
    """``function(*tensors)``, launched on a stream that branches off the current one here; None: on that itself.

    The tensors may be let go of at once. What is allocated is ``side``'s, all of whose work begins with this: so it may
    be let go of while the current stream has yet to read it. (``record_stream`` would not do: it does nothing for
    memory that comes through DLPack.)
    """
    if side is None:
        return function(*tensors)
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        result = function(*tensors)
    for tensor in tensors:
        tensor.record_stream(side)
    return result
