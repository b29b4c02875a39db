"""NcclCommunicator: arrays in GPU memory over NCCL, through CuPy.

NCCL has no all-to-all: one is a group of sends and receives. Exchanges run on a stream of their own, so that the
caller's stream can compute beside them, and the host waits for none of them. Whether one takes too long is seen by
a thread, which then ends NCCL's kernels: whoever waits for the device comes back, and the next call raises
CommError.
"""

import ctypes
import importlib.util
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import DTYPE_NAMES, Array, DeviceType, Space
from ..errors import CommError, DeviceError, MissingDependencyError
from .base import DEFAULT_TIMEOUT, SET_UP, WatchedCommunicator
from .communicator import Parts, Step
from .control import Control
from .host import row_bytes


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

TICK_SECONDS = 0.05  # between two looks at the exchanges under way
HIGH_PRIORITY = -1  # of a stream: its blocks come first wherever a multiprocessor has room
NOT_READY = 600  # cudaErrorNotReady
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
# Between two GPUs NCCL has up to 32 blocks on NVLink, each as large as a multiprocessor, in clusters of four that want
# four neighbours: among exactly 32 that products leave free some find none. Other GPUs than Hopper's have none to be
# left free: there a product's blocks come and go, and an exchange finds room.
MULTIPROCESSORS = {"90": 40}


@dataclass
class _Underway:
    number: int
    ready: Any  # event: the caller's stream has come to it
    ended: Any = None  # event; until it is launched, None


class NcclCommunicator(WatchedCommunicator):
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
        super().__init__(control, timeout)
        self.device_id = runtime.getDevice() if device_id is None else device_id
        capability = cupy.cuda.Device(self.device_id).compute_capability
        self.multiprocessors = MULTIPROCESSORS.get(capability, 0) if self.size > 1 else 0
        own = nccl.get_unique_id() if self.rank == 0 else b""
        unique_id = bytes.fromhex(self.gather(own.hex(), SET_UP)[0])
        self._comm = self._initialized(unique_id)
        with cupy.cuda.Device(self.device_id):
            self._stream = cupy.cuda.Stream(non_blocking=True, priority=HIGH_PRIORITY)
        self._types = {
            "int32": nccl.NCCL_INT32,
            "int64": nccl.NCCL_INT64,
            "float32": nccl.NCCL_FLOAT32,
            "float64": nccl.NCCL_FLOAT64,
        }
        self._pinned: Any = None  # for `read`; grows
        self._order: deque[_Underway] = deque()  # of the exchanges on the stream
        threading.Thread(target=self._watch_over, name="ffmoe-nccl", daemon=True).start()

    def _initialized(self, unique_id: tuple[Any, ...] | bytes) -> Any:
        """NCCL's communicator. It waits for all ranks, without a deadline of its own: so on a thread."""
        made: list[Any] = []
        failures: list[BaseException] = []

        def initialize() -> None:
            try:
                with cupy.cuda.Device(self.device_id):
                    made.append(nccl.NcclCommunicator(self.size, unique_id, self.rank))
            except BaseException as error:
                failures.append(error)

        threading.Thread(target=initialize, name="ffmoe-nccl-set-up", daemon=True).start()
        number, everyone = self._watch.begin(SET_UP), set(range(self.size))
        self._watch.wait(number, lambda: set() if made or failures else everyone)
        if failures:
            self.abort(f"{type(failures[0]).__name__}: {failures[0]}")
            raise CommError(
                f"{SET_UP}: NCCL failed on this rank ({failures[0]})", (self.rank,), *SET_UP
            ) from failures[0]
        return made[0]

    def all_to_all_v(
        self,
        space: Space,
        parts: Parts,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        step: Step,
    ) -> "NcclTransfer":
        to_ranks, from_ranks = self._runs(send_counts), self._runs(recv_counts)

        def launch() -> None:
            stream = self._stream.ptr
            for send, recv in parts:
                address, width = send.ptr, row_bytes(send)
                for first, rows, rank in to_ranks:
                    self._comm.send(address + first * width, rows * width, nccl.NCCL_UINT8, rank, stream)
                address, width = recv.ptr, row_bytes(recv)
                for first, rows, rank in from_ranks:
                    self._comm.recv(address + first * width, rows * width, nccl.NCCL_UINT8, rank, stream)

        transfer = self._exchange(space, parts, step, launch)
        self._count_bytes(parts, send_counts, step)
        return transfer

    def all_reduce(self, space: Space, parts: Parts, step: Step) -> "NcclTransfer":
        kinds = [self._types[DTYPE_NAMES[send.dtype]] for send, _ in parts]

        def launch() -> None:
            for (send, recv), kind in zip(parts, kinds, strict=True):
                self._comm.allReduce(send.ptr, recv.ptr, send.size, kind, nccl.NCCL_SUM, self._stream.ptr)

        return self._exchange(space, parts, step, launch)

    def read(self, space: Space, array: Array, step: Step) -> Callable[[], np.ndarray]:
        with _OnDevice(self.device_id):
            if self._pinned is None or self._pinned.size() < array.nbytes:
                self._pinned = cupy.cuda.alloc_pinned_memory(array.nbytes)
            # on the exchanges' stream: what the caller's has to do meanwhile is not waited for
            runtime.memcpyAsync(
                self._pinned.ptr, array.ptr, array.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr
            )
            copied = _record(self._stream.ptr)
        memory = np.frombuffer(self._pinned, DTYPE_NAMES[array.dtype], array.size).reshape(array.shape)

        def finish() -> np.ndarray:
            while not (_is_over(copied) or self._watch.failed):
                time.sleep(0)  # the device idles until the counts are known, so the host does not
            if self._watch.failed:  # and what was copied is not what was to come
                self._watch.begin(step)  # raises
            return memory.copy()

        return finish

    def _runs(self, counts: Sequence[int]) -> list[tuple[int, int, int]]:
        """(first row, rows, rank) wherever there are rows.

        A rank's rows to itself go the same way: a copy beside the others would take their bandwidth.
        """
        before = list(accumulate(counts, initial=0))
        places = self._in_rounds(len(counts), (*self._others, self.rank))
        return [(before[place], counts[place], rank) for place, rank in places if counts[place]]

    def _exchange(self, space: Space, parts: Parts, step: Step, launch: Callable[[], None]) -> "NcclTransfer":
        """What is launched goes to the exchanges' stream, after all that the caller's stream has to do so far."""
        for pair in parts:
            for array in pair:
                if array.device_type != DeviceType.CUDA or array.device_id != self.device_id:
                    raise DeviceError(
                        f"this communicator exchanges memory of cuda:{self.device_id}, but the layer's arrays are "
                        f"on {array.device}: move the layer, or make the communicator there"
                    )
        number = self._watch.begin(step)
        with _OnDevice(self.device_id):  # stream 0 is that of the current device
            exchange = _Underway(number, _record(space.stream))
            # before it is launched: at the first one NCCL waits for the others there
            self._order.append(exchange)
            runtime.streamWaitEvent(self._stream.ptr, exchange.ready.ptr)
            try:
                nccl.groupStart()
                try:
                    launch()
                finally:
                    nccl.groupEnd()
            except nccl.NcclError as error:
                if self._watch.failed:  # which has ended NCCL's waiting
                    self._watch.begin(step)  # raises
                self.abort(f"NcclError: {error}")
                raise CommError(f"{step}: NCCL failed on this rank ({error})", (self.rank,), *step) from error
            exchange.ended = _record(self._stream.ptr)
        transfer = NcclTransfer(self, space, exchange.ended, parts)
        self._underway.add(transfer)
        return transfer

    def _watch_over(self) -> None:
        """Ends NCCL's kernels when an exchange waits too long for others, or another rank has failed."""
        runtime.setDevice(self.device_id)
        _leave_captures_alone()
        others = set(self._others)
        since = None  # when the first exchange under way was seen to wait for others
        try:
            while not self._watch.failed:
                time.sleep(TICK_SECONDS)
                while self._order and self._order[0].ended and _is_over(self._order[0].ended):
                    self._watch.end(self._order.popleft().number)
                    since = None
                # what stood before it on the exchanges' stream has ended: once it is ready, its turn has come
                if not self._order or not _is_over(self._order[0].ready):
                    continue
                since = time.monotonic() if since is None else since
                self._watch.look(since, others)
        except CommError:
            pass
        except BaseException as error:  # without a watch the group is of no more use
            self.abort(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._comm.abort()


class NcclTransfer:
    """See ``Transfer``: the caller's stream waits, the host does not.

    Memory that was allocated for the caller's stream may be used again by what comes later on that stream. So it
    is kept until the stream waits for the exchange.
    """

    def __init__(self, comm: NcclCommunicator, space: Space, ended: Any, keep: Any) -> None:
        self._comm = comm
        self._stream = space.stream
        self._ended = ended
        self._keep = keep

    def wait(self) -> None:
        with _OnDevice(self._comm.device_id):
            runtime.streamWaitEvent(self._stream, self._ended.ptr)
        self._comm._underway.discard(self)
        self._keep = None


class _OnDevice:
    """Makes a device the current one, if it is not: cheaper than ``cupy.cuda.Device``, as it mostly is."""

    def __init__(self, device_id: int) -> None:
        self._device_id = device_id

    def __enter__(self) -> None:
        self._before = runtime.getDevice()
        if self._before != self._device_id:
            runtime.setDevice(self._device_id)

    def __exit__(self, *error: object) -> None:
        if self._before != self._device_id:
            runtime.setDevice(self._before)


def _leave_captures_alone() -> None:
    """This thread asks for events while others may capture a CUDA graph, which by default would fail for that."""
    mode = ctypes.c_int(THREAD_LOCAL)
    ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def _record(stream: int) -> Any:
    event = cupy.cuda.Event(disable_timing=True)
    runtime.eventRecord(event.ptr, stream)
    return event


def _is_over(event: Any) -> bool:
    """Raises CUDARuntimeError after a kernel that failed: nothing would ever be over."""
    status = runtime.eventQuery(event.ptr)
    if status not in (0, NOT_READY):
        raise runtime.CUDARuntimeError(status)
    return bool(status == 0)
