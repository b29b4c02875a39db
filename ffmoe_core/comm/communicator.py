"""The Communicator protocol: what expert parallelism asks of a transport."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..arrays import DTYPE_NAMES, Array, Space, as_array
from ..errors import DTypeError

SUMMED = ("int32", "int64", "float32", "float64")


class Step(NamedTuple):
    """What is being exchanged, and for which layer: how an error names it."""

    name: str  # "counts", "dispatch", "combine", ...
    layer: str = ""

    def __str__(self) -> str:
        return f"{self.name} of {self.layer}" if self.layer else self.name


Parts = Sequence[tuple[Array, Array]]  # (sent, received)


class Transfer(Protocol):
    """An exchange on its way."""

    def wait(self) -> None:
        """What was received may be read, and what was sent overwritten. Raises CommError."""


class Communicator(Protocol):
    """A group of ranks that exchange arrays.

    Every rank calls the same methods in the same order, with ranks that have nothing to send among them. No
    call waits longer than ``timeout`` seconds for another rank: it raises CommError, which names the ranks
    that are missing and the step, and the communicator is of no more use then.
    """

    rank: int
    size: int
    timeout: float
    sent_bytes: Counter[str]  # to other ranks by all_to_all and all_to_all_v, by the step's name
    multiprocessors: int  # of the device, that an exchange under way keeps busy

    def all_to_all(self, space: Space, send: Array, recv: Array, step: Step) -> Transfer:
        """Row r of ``send`` [size, n] goes to rank r, which finds it in the sender's row of ``recv``."""

    def all_to_all_v(
        self,
        space: Space,
        parts: Parts,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        step: Step,
    ) -> Transfer:
        """Rows by rank: the first ``send_counts[0]`` rows go to rank 0, the next to rank 1, and so on.

        Each part has rows of its own width and dtype, and all have the same counts. ``sent`` may be longer
        than the counts' sum. Rows from rank 0 come first in ``received``. Counts may be of several rounds, one after
        the other: after the last rank's rows come more for rank 0, and in ``received`` more from it.
        """

    def all_reduce(self, space: Space, parts: Parts, step: Step) -> Transfer:
        """``received`` = the sum of every rank's ``sent``: the same bits on every rank."""

    def read(self, space: Space, array: Array, step: Step) -> Callable[[], np.ndarray]:
        """Starts to bring an array to the host that ``all_to_all`` is filling.

        What it returns gives the NumPy copy, once that exchange has been waited for; it waits for the device, but not
        past the deadline.
        """

    def gather(self, text: str, step: Step) -> list[str]:
        """Every rank's text, in the order of ranks. For set-up: slow."""

    def barrier(self, step: Step) -> None:
        """Returns when every rank has called it."""

    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one has failed: their calls raise CommError with ``reason``."""


def all_reduced(comm: Communicator, array: Any, step: Step) -> Any:
    """The sum over ranks of an array of any framework: int32, int64, float32 or float64.

    Raises CommError, DTypeError for other dtypes, and what an array that cannot be exchanged raises.
    """
    own, space = as_array(array)
    dtype = DTYPE_NAMES[own.dtype]
    if dtype not in SUMMED:
        raise DTypeError(f"array has dtype {dtype}; expected {', '.join(SUMMED)}: cast it before")
    total = space.empty(own.shape, own.dtype)
    comm.all_reduce(space, [(own, total)], step).wait()
    return space.export(total)
