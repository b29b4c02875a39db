"""What transports have in common: deadlines, the count of the bytes sent, texts over the control line."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..arrays import Array, Space
from .communicator import Parts, Step, Transfer
from .control import Control
from .host import row_bytes
from .watch import Watch

DEFAULT_TIMEOUT = 300.0
SET_UP = Step("set-up")


class WatchedCommunicator:
    """The part of ``Communicator`` that does not depend on how arrays cross."""

    multiprocessors = 0

    def __init__(self, control: Control, timeout: float) -> None:
        self.rank = control.rank
        self.size = control.size
        self.sent_bytes: Counter[str] = Counter()
        self._watch = Watch(control, timeout)
        self.timeout = self._watch.timeout
        # each beginning with its neighbour, so that not all send to one at a time
        self._others = [(self.rank + i) % self.size for i in range(1, self.size)]
        # Transfers hold the memory that is written to: one that nobody came to wait for is not let go.
        self._underway: set[Any] = set()

    def all_to_all(self, space: Space, send: Array, recv: Array, step: Step) -> Transfer:
        counts = [1] * self.size
        return self.all_to_all_v(space, [(send, recv)], counts, counts, step)

    def all_to_all_v(
        self,
        space: Space,
        parts: Parts,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        step: Step,
    ) -> Transfer:
        raise NotImplementedError

    def read(self, space: Space, array: Array, step: Step) -> Callable[[], np.ndarray]:
        return lambda: space.to_host(array)

    def gather(self, text: str, step: Step) -> list[str]:
        return self._watch.gather(text, step)

    def barrier(self, step: Step) -> None:
        self._watch.gather("", step)

    def abort(self, reason: str) -> None:
        self._watch.abort(reason)

    def _in_rounds(self, num_counts: int, ranks: Sequence[int]) -> list[tuple[int, int]]:
        """(place among the counts, rank), round by round, and in each by ``ranks``."""
        return [(before + rank, rank) for before in range(0, num_counts, self.size) for rank in ranks]

    def _count_bytes(self, parts: Parts, send_counts: Sequence[int], step: Step) -> None:
        rows = sum(send_counts) - sum(send_counts[self.rank :: self.size])
        self.sent_bytes[step.name] += rows * sum(row_bytes(send) for send, _ in parts)
