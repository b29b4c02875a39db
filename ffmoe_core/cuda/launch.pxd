from libc.stdint cimport uintptr_t

ctypedef void* Parameter  # the address of an argument; cdef Parameter[n] makes an array of them


cdef class Kernel:
    cdef void* function         # CUfunction
    cdef void* context          # CUcontext it was loaded in
    cdef object keep_alive
    cdef str name
    cdef unsigned int starts_early  # 1: while the kernel before it on the stream ends
    cdef int launch(
        self,
        unsigned int grid_x,
        unsigned int grid_y,
        unsigned int grid_z,
        unsigned int block,
        unsigned int smem,
        uintptr_t stream,
        void** params,
    ) except -1


cdef Kernel kernel(str file, str entry, tuple defines, int device_id, unsigned int dynamic_smem)
cdef int set_words(
    int device_id, uintptr_t to, const unsigned int* words, int words_each, size_t count, uintptr_t stream
) except -1
cdef int multiprocessor_count(int device_id) except -1
cdef int compute_capability(int device_id) except -1
cdef int ensure_context(int device_id) except -1
