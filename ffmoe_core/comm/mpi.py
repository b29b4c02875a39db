"""MpiCommunicator: arrays in host memory over MPI, through mpi4py.

Everything is made of non-blocking messages from rank to rank, tested in turn until a deadline: MPI's collectives
would neither end nor tell who is missing when a rank dies. A message is sent even where there are no rows, so
that each rank hears from every other in each exchange.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..arrays import Space
from ..errors import CommError, MissingDependencyError
from .base import DEFAULT_TIMEOUT, SET_UP, WatchedCommunicator
from .communicator import Parts, Step
from .host import cut_by_rank, host_bytes, host_numbers, row_bytes
from .watch import check_timeout

try:
    from mpi4py import MPI as MPI  # for others, too: this module says what to install
except ImportError as error:
    raise MissingDependencyError(
        f"MPI communicators need mpi4py and an MPI library ({error}): pip install 'ffmoe[mpi]'"
    ) from error

Messages = list[tuple[int, np.ndarray]]  # (rank, bytes)


class MpiControl:
    """See ``Control``: notices as small messages on a duplicate of ``comm``, made within ``timeout`` seconds."""

    def __init__(self, comm: MPI.Comm | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        comm = MPI.COMM_WORLD if comm is None else comm
        check_timeout(timeout)
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self._comm = _duplicate(comm, timeout)
        self._sends: list[tuple[MPI.Request, bytes]] = []
        self._lock = threading.Lock()  # a communicator's own thread may poll, too

    def post(self, notice: str) -> None:
        text = notice.encode()
        with self._lock:
            for rank in range(self.size):
                if rank != self.rank:
                    # the rank may be gone, as the notice may be about to say
                    with contextlib.suppress(MPI.Exception):
                        self._sends.append((self._comm.Isend([text, MPI.BYTE], rank), text))

    def poll(self) -> list[tuple[int, str]]:
        notices = []
        status = MPI.Status()
        # a dead peer is an error; those who live are heard at the next look
        with self._lock, contextlib.suppress(MPI.Exception):
            while self._comm.Iprobe(status=status):
                text = bytearray(status.Get_count(MPI.BYTE))
                self._comm.Recv([text, MPI.BYTE], status.Get_source())
                notices.append((status.Get_source(), text.decode()))
            self._sends = [(request, text) for request, text in self._sends if not request.Test()]
        return notices


class MpiCommunicator(WatchedCommunicator):
    """See ``Communicator``.

    Parameters
    ----------
    comm : an mpi4py communicator, COMM_WORLD by default. It is duplicated, which all its ranks do together.
    timeout : seconds a call waits for other ranks at most.

    After a failure the process ends, when it does, without MPI_Finalize, which would wait for the missing ranks.
    """

    def __init__(self, comm: MPI.Comm | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        comm = MPI.COMM_WORLD if comm is None else comm
        super().__init__(MpiControl(comm, timeout), timeout)
        self._comm = _duplicate(comm, timeout)

    def all_to_all_v(
        self,
        space: Space,
        parts: Parts,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        step: Step,
    ) -> "MpiTransfer":
        sends: Messages = []
        recvs: Messages = []
        for send, recv in parts:
            source, target = host_bytes(send), host_bytes(recv)
            to_send = cut_by_rank(send_counts, row_bytes(send))
            to_recv = cut_by_rank(recv_counts, row_bytes(recv))
            for place in range(self.rank, len(to_send), self.size):
                target[to_recv[place]] = source[to_send[place]]
            places = self._in_rounds(len(to_send), self._others)
            sends += [(rank, source[to_send[place]]) for place, rank in places]
            recvs += [(rank, target[to_recv[place]]) for place, rank in places]
        self._count_bytes(parts, send_counts, step)
        return self._start(sends, recvs, step, parts)

    def all_reduce(self, space: Space, parts: Parts, step: Step) -> "MpiTransfer":
        sends: Messages = []
        recvs: Messages = []
        everyones = []
        for send, _ in parts:
            source = host_bytes(send)
            everyone = np.empty((self.size, source.size), np.uint8)
            everyone[self.rank] = source
            everyones.append(everyone)
            sends += [(rank, source) for rank in self._others]
            recvs += [(rank, everyone[rank]) for rank in self._others]

        def add_up() -> None:
            for (_, recv), everyone in zip(parts, everyones, strict=True):
                total = host_numbers(recv)
                total[:] = 0
                for numbers in everyone.view(total.dtype):  # in the order of ranks: the same bits on each
                    total += numbers

        return self._start(sends, recvs, step, parts, add_up)

    def _start(
        self,
        sends: Messages,
        recvs: Messages,
        step: Step,
        keep: Any,
        finish: Callable[[], None] | None = None,
    ) -> "MpiTransfer":
        number = self._watch.begin(step)
        requests = []
        dead = set()
        for begin, messages in ((self._comm.Irecv, recvs), (self._comm.Isend, sends)):
            for rank, memory in messages:
                try:
                    requests.append((rank, begin([memory, MPI.BYTE], rank)))
                except MPI.Exception:
                    dead.add(rank)
        transfer = MpiTransfer(self, number, requests, dead, keep, finish)
        self._underway.add(transfer)
        return transfer


class MpiTransfer:
    """See ``Transfer``: messages on their way, the memory they need, and what is left to do when all came."""

    def __init__(
        self,
        comm: MpiCommunicator,
        number: int,
        requests: list[tuple[int, MPI.Request]],
        dead: set[int],
        keep: Any,
        finish: Callable[[], None] | None,
    ) -> None:
        self._comm = comm
        self._number = number
        self._requests = requests
        self._dead = dead
        self._keep = keep
        self._finish = finish

    def wait(self) -> None:
        self._comm._watch.wait(self._number, self._waiting_for)
        self._comm._underway.discard(self)
        if self._finish is not None:
            self._finish()
        self._keep = self._finish = None

    def _waiting_for(self) -> set[int]:
        left = []
        for rank, request in self._requests:
            try:
                if not request.Test():
                    left.append((rank, request))
            except MPI.Exception:
                self._dead.add(rank)
        self._requests = left
        return {rank for rank, _ in left} | self._dead


def _duplicate(comm: MPI.Comm, timeout: float) -> MPI.Comm:
    copy, request = comm.Idup()
    deadline = time.monotonic() + timeout
    while not request.Test():
        if time.monotonic() > deadline:
            raise CommError(
                f"{SET_UP}: not all {comm.Get_size()} ranks made this communicator within {timeout:g} s",
                (),
                *SET_UP,
            )
        time.sleep(1e-4)
    copy.Set_errhandler(MPI.ERRORS_RETURN)
    return copy
