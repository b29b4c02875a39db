"""Tensor maps: what Hopper's copy engine has to know of an array in device memory."""

import ctypes

from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t

from ..arrays cimport BFLOAT16, Array

from ..errors import KernelError
from .launch cimport ensure_context

ctypedef int (*Encode)(
    void* out, int dtype, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
    const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int l2_promotion,
    int oob_fill,
) noexcept nogil

# Values of the driver's enumerations.
cdef enum:
    TYPE_FLOAT16 = 6
    TYPE_BFLOAT16 = 9
    INTERLEAVE_NONE = 0
    SWIZZLE_128B = 3
    L2_PROMOTION_256B = 3
    OUTSIDE_IS_ZERO = 0
    BOX_COLUMNS = 64  # 128 bytes: the swizzle's width

cdef Encode encode = NULL


cdef int resolve() except -1:
    global encode
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    encode = <Encode><uintptr_t>ctypes.cast(function, ctypes.c_void_p).value
    return 0


cdef int map_matrices(
    TensorMap* out, Array array, int64_t matrices, int64_t rows, int64_t columns, int box_rows
) except -1:
    """Map a 16-bit array as [matrices, rows, columns], for boxes of box_rows x 64.

    Columns must divide by 8 and the array be 16-byte aligned. Outside the array a box is zero.
    """
    return map_array(out, array, [columns, rows, matrices], [columns, columns * rows], box_rows)


cdef int map_halves(TensorMap* out, Array array, int64_t rows, int64_t columns, int box_rows) except -1:
    """The same for the halves of an array [rows, 2 * columns], as [2, rows, columns]."""
    return map_array(out, array, [columns, rows, 2], [2 * columns, columns], box_rows)


cdef int map_array(
    TensorMap* out, Array array, const int64_t* sizes, const int64_t* steps, int box_rows
) except -1:
    """sizes: innermost first; steps: elements from one to the next, of all but the innermost."""
    # the driver refuses an array without rows, of which nothing will be moved
    cdef uint64_t* dims = [<uint64_t>sizes[0], <uint64_t>max(sizes[1], 1), <uint64_t>sizes[2]]
    cdef uint64_t* strides = [<uint64_t>steps[0] * 2, <uint64_t>steps[1] * 2]
    cdef uint32_t* box = [BOX_COLUMNS, <uint32_t>box_rows, 1]
    cdef uint32_t* ones = [1, 1, 1]
    cdef int error
    if encode == NULL:
        resolve()
    ensure_context(array.device_id)  # the driver wants one, any
    out.at = <void*>((<uintptr_t>out.memory + MAP_ALIGNMENT - 1) & ~<uintptr_t>(MAP_ALIGNMENT - 1))
    error = encode(
        out.at, TYPE_BFLOAT16 if array.dtype == BFLOAT16 else TYPE_FLOAT16, 3, array.data, dims, strides, box,
        ones, INTERLEAVE_NONE, SWIZZLE_128B, L2_PROMOTION_256B, OUTSIDE_IS_ZERO,
    )
    if error != 0:
        raise KernelError(
            f"cuTensorMapEncodeTiled: error {error} ([{sizes[2]}, {sizes[1]}, {sizes[0]}], {box_rows} rows a box)"
        )
    return 0
