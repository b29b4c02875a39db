"""A stream beside another, its origin, on which work can run that the origin waits for later.

What the runtime allocates on it can be let go of while its origin still reads it, and is then given out for other work
on it. torch's ``record_stream`` would put that off, but does nothing for memory that comes through DLPack, as the
runtime's does. So all of the runtime's work on a stream beside another begins after what its origin has by then, in
forward and in backward.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

_T = TypeVar("_T")


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device; beside itself it is itself."""
    return torch.cuda.Stream(device)


def beside(side: torch.cuda.Stream | None, function: Callable[..., _T], *tensors: torch.Tensor) -> _T:
    """``function(*tensors)`` on a stream beside the current one, or where it is None on that itself.

    Tensors of torch's own memory may be let go of at once.
    """
    if side is None:
        return function(*tensors)
    side.wait_stream(torch.cuda.current_stream(side.device))
    try:
        with torch.cuda.stream(side):
            return function(*tensors)
    finally:
        for tensor in tensors:
            tensor.record_stream(side)


def after(origin: torch.cuda.Stream | None) -> None:
    """For backward of what ran beside ``origin``, which autograd runs there, too: on the current stream."""
    if origin is not None:
        torch.cuda.current_stream(origin.device).wait_stream(origin)
