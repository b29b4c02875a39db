from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

# Element types the runtime knows. The order is part of the kernels' host interface.
cpdef enum DType:
    FLOAT32 = 0
    FLOAT64 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    INT32 = 4
    INT64 = 5
    UINT8 = 6

# The values of DLPack's DLDeviceType.
cpdef enum DeviceType:
    CPU = 1
    CUDA = 2

cdef enum:
    MAX_NDIM = 4

cpdef int itemsize(int dtype) except -1


cdef inline int64_t padded(int64_t nbytes) noexcept:
    """Room for ``nbytes`` in an allocation that several arrays share, as an allocation costs host time.

    What follows is as aligned as the allocation itself.
    """
    return (nbytes + 255) // 256 * 256


cdef class Array:
    """A C-contiguous array of any framework, seen as pointer, shape, dtype and device."""

    cdef char* data
    cdef int64_t[4] dims            # dims[ndim:] are 1
    cdef readonly int ndim
    cdef readonly int dtype         # DType
    cdef readonly int device_type   # DeviceType
    cdef readonly int device_id
    cdef readonly object owner      # keeps the memory alive
    cdef void* managed              # DLManagedTensorVersioned* not yet handed to a framework, or NULL
    cpdef Array at(self, int64_t offset, tuple shape, int dtype)


cdef class Space:
    """Where new arrays come from: one framework's allocator, on one device, for one stream."""

    cdef readonly int device_type
    cdef readonly int device_id
    cdef readonly uintptr_t stream  # the caller's current CUDA stream; 0 on CPU
    cdef readonly int spared        # multiprocessors that are left to other work, such as an exchange
    cdef Array zeros                # on a GPU, int32: for kernels to count in, each of its elements for one kernel
    cdef int zeros_left             # of its last elements that nobody has had yet
    cpdef Array empty(self, tuple shape, int dtype)
    cpdef object export(self, Array array)
    cpdef object to_host(self, Array array)


cdef Array view(object obj, str name)
cdef Space space_of(object obj, Array array)
