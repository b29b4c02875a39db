from enum import IntEnum
from typing import Any

import numpy as np

DTYPE_NAMES: tuple[str, ...]

class DType(IntEnum):
    FLOAT32 = 0
    FLOAT64 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    INT32 = 4
    INT64 = 5
    UINT8 = 6

class DeviceType(IntEnum):
    CPU = 1
    CUDA = 2

class Array:
    """A C-contiguous array of any framework, seen as pointer, shape, dtype and device."""

    @property
    def ndim(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def ptr(self) -> int: ...
    @property
    def dtype(self) -> int: ...
    @property
    def dtype_name(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def device_type(self) -> int: ...
    @property
    def device_id(self) -> int: ...
    @property
    def owner(self) -> Any: ...
    def at(self, offset: int, shape: tuple[int, ...], dtype: int) -> Array: ...

class Space:
    """Where new arrays come from: one framework's allocator, on one device, for one stream."""

    @property
    def device_type(self) -> int: ...
    @property
    def device_id(self) -> int: ...
    @property
    def stream(self) -> int: ...
    @property
    def spared(self) -> int:
        """Multiprocessors that kernels which would take all of them leave to other work."""

    def empty(self, shape: tuple[int, ...], dtype: int) -> Array:
        """An uninitialised Array. Raises OutOfMemoryError."""

    def export(self, array: Array) -> Any:
        """The caller's own kind of array for one that ``empty`` made."""

    def to_host(self, array: Array) -> np.ndarray:
        """A NumPy copy of the array. Waits for the device."""

def itemsize(dtype: int) -> int:
    """Bytes an element of ``dtype`` takes."""

def as_array(obj: Any, name: str = "array") -> tuple[Array, Space]:
    """``obj`` as an Array, and the Space it lives in. ``name`` is what an error calls it.

    Raises DTypeError, DeviceError, LayoutError (not C-contiguous), ShapeError (more than 4 dimensions),
    MissingDependencyError (an array on a GPU without CuPy).
    """
