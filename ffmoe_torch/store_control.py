"""StoreControl: notices between ranks as keys of a process group's store."""

import contextlib
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist


class StoreControl:
    """See ``Control``: notices as keys of the store that the default process group was made with.

    A request to a store has no deadline, and the process that holds the store may hang as any other. So a thread makes
    them, and who posts or polls waits for nobody: what the thread has found by then is what has come.
    """

    def __init__(self, group: dist.ProcessGroup, name: str) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        ranks = "-".join(map(str, dist.get_process_group_ranks(group)))
        prefix = f"ffmoe/{group.group_name}/{ranks}/{name}"
        store = dist.distributed_c10d._get_default_store()
        # A group that was destroyed and made anew over the same store has the same names: the ranks of its n-th life
        # are those that count to n times their number.
        life = (store.add(f"{prefix}/ranks", 1) - 1) // self.size
        self._line = _Line(dist.distributed_c10d.PrefixStore(f"{prefix}/{life}", store), self.rank, self.size)
        threading.Thread(target=_serve, args=(self._line,), name="ffmoe-store", daemon=True).start()
        end = weakref.finalize(self, self._line.close)
        end.atexit = False  # the last notices leave at the end of the process

    def post(self, notice: str) -> None:
        self._line.leaving.append(notice)
        self._line.work.set()

    def poll(self) -> list[tuple[int, str]]:
        self._line.work.set()
        notices = []
        with contextlib.suppress(IndexError):  # another thread may poll, too
            while True:
                notices.append(self._line.come.popleft())
        return notices


@dataclass
class _Line:
    """What the thread has of a StoreControl, which may go before it."""

    store: Any
    rank: int
    size: int
    leaving: deque[str] = field(default_factory=deque)
    come: deque[tuple[int, str]] = field(default_factory=deque)
    work: threading.Event = field(default_factory=threading.Event)
    closed: bool = False

    def close(self) -> None:
        self.closed = True
        self.work.set()


def _serve(line: _Line) -> None:
    posted = seen = 0  # notices of this rank, and of anyone
    following = [0] * line.size  # the number of each rank's next notice
    while not line.closed:
        line.work.wait()
        line.work.clear()
        try:
            while line.leaving:
                line.store.set(f"{line.rank}/{posted}", line.leaving[0])
                line.store.add("posted", 1)
                line.leaving.popleft()
                posted += 1
            count = line.store.add("posted", 0)
            if count == seen:
                continue
            for rank in range(line.size):
                while rank != line.rank and line.store.check([f"{rank}/{following[rank]}"]):
                    line.come.append((rank, line.store.get(f"{rank}/{following[rank]}").decode()))
                    following[rank] += 1
            seen = count
        except (dist.DistError, RuntimeError):
            return  # the store has gone with the rank that held it
