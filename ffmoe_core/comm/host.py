"""Arrays in host memory as bytes and numbers, for transports that read host memory only."""

import ctypes
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from ..arrays import DTYPE_NAMES, Array, DeviceType
from ..errors import DeviceError


def host_bytes(array: Array) -> np.ndarray:
    """The array's memory as uint8 [nbytes], without a copy. The array must outlive it."""
    if array.device_type != DeviceType.CPU:
        raise DeviceError(
            f"this communicator exchanges host memory, but the layer's arrays are on {array.device}; "
            'use ffmoe_core.comm.nccl (ep_backend="nccl")'
        )
    if array.nbytes == 0:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * array.nbytes).from_address(array.ptr))


def host_numbers(array: Array) -> np.ndarray:
    """The array's memory as numbers [size], without a copy; not for bfloat16."""
    return host_bytes(array).view(DTYPE_NAMES[array.dtype])


def cut_by_rank(counts: Sequence[int], row_bytes: int) -> list[slice]:
    """The bytes of each rank's rows, for rows that stand in the order of ranks."""
    ends = accumulate(counts, initial=0)
    return [slice(a * row_bytes, b * row_bytes) for a, b in pairwise(ends)]


def row_bytes(array: Array) -> int:
    """Bytes of one row of [rows, n] (or [rows])."""
    return array.nbytes // array.shape[0] if array.shape[0] else 0
