"""NcclCommunicator: arrays in GPU memory over NCCL, through CuPy.

NCCL has no all-to-all: one is a group of sends and receives. Exchanges run on a stream of their own, so that the
caller's stream can compute beside them, and the host waits for none of them. Whether one takes too long is seen by
a thread, which then ends NCCL's kernels: whoever waits for the device comes back, and the next call raises
CommError.
"""

import contextlib
import ctypes
import importlib.util
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arrays import DTYPE_NAMES, Array, DeviceType, Space
from ..errors import CommError, DeviceError, MissingDependencyError
from .communicator import Parts, Step
from .control import Control
from .host import cut_by_rank, row_bytes
from .watch import Watch


def _load_library() -> None:
    """Load the NCCL of NVIDIA's wheel, if it is there: the system's loader does not look for it in a wheel."""
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or ()) if wheels else ():
        library = Path(folder, "nccl", "lib", "libnccl.so.2")
        if library.is_file():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return


try:
    import cupy

    _load_library()
    from cupy.cuda import nccl, runtime
except ImportError as error:
    raise MissingDependencyError(
        f"NCCL communicators need CuPy with NCCL ({error}): pip install 'ffmoe[cuda12]' or 'ffmoe[cuda13]', and "
        "nvidia-nccl-cu12 or -cu13"
    ) from error

DEFAULT_TIMEOUT = 300.0
SET_UP = Step("set-up")
TICK_SECONDS = 0.05  # between two looks at the exchanges under way
PAUSE_SECONDS = 2e-5  # of the host, which waits for counts


class _Underway(NamedTuple):
    number: int
    started: Any  # event: the exchange's turn on its stream has come
    ended: Any  # event


class NcclCommunicator:
    """See ``Communicator``.

    Parameters
    ----------
    control : a line between the hosts, such as ``MpiControl``; the unique id and notices of failures go over it.
    device_id : this rank's GPU; CuPy's current device by default. Each rank needs one of its own.
    timeout : seconds an exchange waits for other ranks at most.
    """

    def __init__(
        self, control: Control, *, device_id: int | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        self.rank = control.rank
        self.size = control.size
        self.device_id = runtime.getDevice() if device_id is None else device_id
        self.sent_bytes: Counter[str] = Counter()
        self._watch = Watch(control, timeout)
        self.timeout = self._watch.timeout
        own = nccl.get_unique_id() if self.rank == 0 else b""
        unique_id = bytes.fromhex(self._watch.gather(own.hex(), SET_UP)[0])
        with cupy.cuda.Device(self.device_id):
            self._comm = nccl.NcclCommunicator(self.size, unique_id, self.rank)
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self._types = {
            "int32": nccl.NCCL_INT32,
            "int64": nccl.NCCL_INT64,
            "float32": nccl.NCCL_FLOAT32,
            "float64": nccl.NCCL_FLOAT64,
        }
        self._pinned: Any = None  # for `read`; grows
        self._underway: deque[_Underway] = deque()
        threading.Thread(target=self._watch_over, name="ffmoe-nccl", daemon=True).start()

    def all_to_all(self, space: Space, send: Array, recv: Array, step: Step) -> "NcclTransfer":
        counts = [1] * self.size
        return self.all_to_all_v(space, [(send, recv)], counts, counts, step)

    def all_to_all_v(
        self,
        space: Space,
        parts: Parts,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        step: Step,
    ) -> "NcclTransfer":
        self._check(parts)
        others = [(self.rank + i) % self.size for i in range(1, self.size)]
        with self._exchange(space, step) as transfer:
            stream = self._stream.ptr
            for send, recv in parts:
                to_send = cut_by_rank(send_counts, row_bytes(send))
                to_recv = cut_by_rank(recv_counts, row_bytes(recv))
                source, target = to_send[self.rank], to_recv[self.rank]
                if source.stop > source.start:
                    runtime.memcpyAsync(
                        recv.ptr + target.start,
                        send.ptr + source.start,
                        source.stop - source.start,
                        runtime.memcpyDeviceToDevice,
                        stream,
                    )
                for rank in others:
                    self.sent_bytes[step.name] += to_send[rank].stop - to_send[rank].start
            nccl.groupStart()
            try:
                for send, recv in parts:
                    to_send = cut_by_rank(send_counts, row_bytes(send))
                    to_recv = cut_by_rank(recv_counts, row_bytes(recv))
                    for rank in others:
                        out, come = to_send[rank], to_recv[rank]
                        if out.stop > out.start:
                            self._comm.send(
                                send.ptr + out.start, out.stop - out.start, nccl.NCCL_UINT8, rank, stream
                            )
                        if come.stop > come.start:
                            self._comm.recv(
                                recv.ptr + come.start, come.stop - come.start, nccl.NCCL_UINT8, rank, stream
                            )
            finally:
                nccl.groupEnd()
        transfer.keep = parts
        return transfer

    def all_reduce(self, space: Space, parts: Parts, step: Step) -> None:
        self._check(parts)
        with self._exchange(space, step) as transfer:
            nccl.groupStart()
            try:
                for send, recv in parts:
                    kind = self._types[DTYPE_NAMES[send.dtype]]
                    self._comm.allReduce(send.ptr, recv.ptr, send.size, kind, nccl.NCCL_SUM, self._stream.ptr)
            finally:
                nccl.groupEnd()
        transfer.wait()

    def read(self, space: Space, array: Array, step: Step) -> np.ndarray:
        host = np.empty(array.shape, DTYPE_NAMES[array.dtype])
        with cupy.cuda.Device(self.device_id):
            if self._pinned is None or self._pinned.size() < array.nbytes:
                self._pinned = cupy.cuda.alloc_pinned_memory(array.nbytes)
            # on the exchanges' stream: what the caller's has to do meanwhile is not waited for
            runtime.memcpyAsync(
                self._pinned.ptr, array.ptr, array.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr
            )
            copied = self._stream.record(cupy.cuda.Event(disable_timing=True))
            while not (copied.done or self._watch.failed):
                time.sleep(PAUSE_SECONDS)
        if self._watch.failed:  # and what was copied is not what was to come
            self._watch.begin(step)  # raises
        memory = np.frombuffer(self._pinned, host.dtype, host.size)
        host[...] = memory.reshape(host.shape)
        return host

    def gather(self, text: str, step: Step) -> list[str]:
        return self._watch.gather(text, step)

    def barrier(self, step: Step) -> None:
        self._watch.gather("", step)

    def abort(self, reason: str) -> None:
        self._watch.abort(reason)

    def _check(self, parts: Parts) -> None:
        for pair in parts:
            for array in pair:
                if array.device_type != DeviceType.CUDA or array.device_id != self.device_id:
                    raise DeviceError(
                        f"this communicator exchanges memory of cuda:{self.device_id}, but the layer's arrays are "
                        f"on {array.device}"
                    )

    @contextlib.contextmanager
    def _exchange(self, space: Space, step: Step) -> Iterator["NcclTransfer"]:
        """What is launched inside goes to the exchanges' stream, after all that the caller's stream has to do."""
        number = self._watch.begin(step)
        with cupy.cuda.Device(self.device_id):
            caller = cupy.cuda.ExternalStream(space.stream)
            self._stream.wait_event(caller.record(cupy.cuda.Event(disable_timing=True)))
            started = self._stream.record(cupy.cuda.Event(disable_timing=True))
            transfer = NcclTransfer(caller, cupy.cuda.Event(disable_timing=True))
            try:
                yield transfer
            except nccl.NcclError as error:
                raise CommError(f"{step}: NCCL failed on this rank ({error})", (self.rank,), *step) from error
            self._stream.record(transfer.ended)
        self._underway.append(_Underway(number, started, transfer.ended))

    def _watch_over(self) -> None:
        """Ends NCCL's kernels when an exchange waits too long for others, or another rank has failed."""
        runtime.setDevice(self.device_id)
        others = set(range(self.size)) - {self.rank}
        since = None  # when the first exchange under way was seen to wait for others
        while not self._watch.failed:
            time.sleep(TICK_SECONDS)
            while self._underway and self._underway[0].ended.done:
                self._watch.end(self._underway.popleft().number)
                since = None
            if not self._underway or not self._underway[0].started.done:
                continue
            since = time.monotonic() if since is None else since
            try:
                self._watch.look(since, others)
            except CommError:
                break
        self._comm.abort()


class NcclTransfer:
    """See ``Transfer``: the caller's stream waits, the host does not."""

    def __init__(self, caller: Any, ended: Any) -> None:
        self.caller = caller
        self.ended = ended
        self.keep: Any = None  # memory that the exchange reads and writes

    def wait(self) -> None:
        self.caller.wait_event(self.ended)
        self.keep = None
