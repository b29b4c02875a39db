"""LocalCommunicator: a group of one rank, in host memory."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ..arrays import Array, Space
from .communicator import Parts, Step
from .host import host_bytes


class LocalCommunicator:
    """See ``Communicator``. What is sent comes back by a copy; nothing can be missing."""

    rank = 0
    size = 1
    timeout = float("inf")
    multiprocessors = 0

    def __init__(self) -> None:
        self.sent_bytes: Counter[str] = Counter()

    def all_to_all(self, space: Space, send: Array, recv: Array, step: Step) -> "LocalCommunicator":
        return self.all_to_all_v(space, [(send, recv)], [1], [1], step)

    def all_to_all_v(
        self,
        space: Space,
        parts: Parts,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        step: Step,
    ) -> "LocalCommunicator":
        for send, recv in parts:
            host_bytes(recv)[:] = host_bytes(send)[: recv.nbytes]
        return self

    def wait(self) -> None:
        """Of a transfer, which is over when it starts."""

    def all_reduce(self, space: Space, parts: Parts, step: Step) -> "LocalCommunicator":
        return self.all_to_all_v(space, parts, [1], [1], step)

    def read(self, space: Space, array: Array, step: Step) -> Callable[[], np.ndarray]:
        return lambda: space.to_host(array)

    def gather(self, text: str, step: Step) -> list[str]:
        return [text]

    def barrier(self, step: Step) -> None:
        pass

    def abort(self, reason: str) -> None:
        pass
