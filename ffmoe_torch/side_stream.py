"""A stream beside another, its origin, on which work can run that the origin waits for later.

What such work reads and writes is the origin's memory: allocated before, and kept until the origin waits. So it is let
go of in the origin's order. torch's ``record_stream`` would not do for all of it: it does nothing for memory that comes
through DLPack, as the runtime's does, and holds other memory back for as long as the host is ahead of the GPU. What the
runtime allocates on the side stream is scratch, which nobody reads anywhere else; the output of torch's operations is
torch's memory, which ``record_stream`` does for.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


@lru_cache(maxsize=256)  # streams from outside of torch may come and go
def side_stream(origin: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for each origin: callers on two streams do not wait for each other.

    Torch has so many streams and no more; beside itself one is itself.
    """
    return torch.cuda.Stream(origin.device)


class Beside:
    """What runs beside the current stream, which waits for it in ``join``."""

    def __init__(self, device: torch.device) -> None:
        self._kept: list[Any] = []
        self.origin = torch.cuda.current_stream(device)
        self.side = side_stream(self.origin)

    def run(self, function: Callable[..., _T], *tensors: torch.Tensor) -> _T:
        """``function(*tensors)`` on the side stream, after what the origin has by now."""
        self._kept.append((function, tensors))
        self.side.wait_stream(self.origin)
        with torch.cuda.stream(self.side):
            return function(*tensors)

    def join(self) -> None:
        self.origin.wait_stream(self.side)
        self._kept.clear()

    def __del__(self) -> None:
        if self._kept:  # an error came before join(), and now comes whoever gets the memory next
            self.join()
