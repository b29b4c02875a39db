"""Launching a compiled kernel with as little host time as the driver allows.

The driver's entry points are looked up in libcuda at run time: building needs no CUDA, and the C ABI of these has not
changed since they came, the last with CUDA 12.
"""

import ctypes

from libc.stdint cimport uintptr_t

from ..errors import KernelError
from .compile import import_cupy, load_function

cdef struct LaunchAttribute:  # CUlaunchAttribute
    int id
    int[1] unused
    int[16] value

cdef struct LaunchConfig:  # CUlaunchConfig
    unsigned int grid_x, grid_y, grid_z
    unsigned int block_x, block_y, block_z
    unsigned int smem
    void* stream
    LaunchAttribute* attributes
    unsigned int attribute_count

cdef enum:
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: see kernels/common/launch_order.cuh. CUDA graphs take it
    # since CUDA 12.3.
    EARLY_START = 6
    EARLY_START_CAPABILITY = 90
    EARLY_START_DRIVER = 12030

ctypedef int (*LaunchKernel)(const LaunchConfig* config, void* function, void** params, void** extra) noexcept nogil
ctypedef int (*SetMemory)(uintptr_t to, unsigned int value, size_t count, void* stream) noexcept nogil
ctypedef int (*SetMemory2D)(
    uintptr_t to, size_t pitch, unsigned int value, size_t width, size_t height, void* stream
) noexcept nogil
ctypedef int (*GetContext)(void** context) noexcept nogil
ctypedef int (*SetContext)(void* context) noexcept nogil
ctypedef int (*GetErrorName)(int error, const char** name) noexcept nogil


cdef class _Driver:
    """The entry points, resolved at the first kernel."""

    cdef LaunchKernel launch
    cdef SetMemory set_memory
    cdef SetMemory2D set_memory_2d
    cdef GetContext get_context
    cdef SetContext set_context
    cdef GetErrorName error_name

    def __cinit__(self):
        library = ctypes.CDLL("libcuda.so.1")
        self.launch = <LaunchKernel><uintptr_t>_address(library.cuLaunchKernelEx)
        self.set_memory = <SetMemory><uintptr_t>_address(library.cuMemsetD32Async)
        self.set_memory_2d = <SetMemory2D><uintptr_t>_address(library.cuMemsetD2D32Async)
        self.get_context = <GetContext><uintptr_t>_address(library.cuCtxGetCurrent)
        self.set_context = <SetContext><uintptr_t>_address(library.cuCtxSetCurrent)
        self.error_name = <GetErrorName><uintptr_t>_address(library.cuGetErrorName)


def _address(function):
    return ctypes.cast(function, ctypes.c_void_p).value


cdef _Driver driver = None
cdef dict kernels = {}
cdef dict contexts = {}
cdef dict multiprocessors = {}
cdef dict capabilities = {}


cdef _Driver drive():
    global driver
    if driver is None:
        driver = _Driver()
    return driver


cdef class Kernel:
    """One compiled variant, loaded on one device."""

    cdef int launch(
        self,
        unsigned int grid_x,
        unsigned int grid_y,
        unsigned int grid_z,
        unsigned int block,
        unsigned int smem,
        uintptr_t stream,
        void** params,
    ) except -1:
        """Launch on ``stream``; the inputs' device need not be the current one."""
        cdef LaunchAttribute early_start
        early_start.id = EARLY_START
        early_start.value[0] = 1
        cdef LaunchConfig config = [
            grid_x, grid_y, grid_z, block, 1, 1, smem, <void*>stream, &early_start, self.starts_early
        ]
        cdef void* current = NULL
        driver.get_context(&current)
        if current != self.context:
            driver.set_context(self.context)
        cdef int error = driver.launch(&config, self.function, params, NULL)
        if current != self.context and current != NULL:
            driver.set_context(current)  # a thread without any context, such as autograd's, keeps ours
        if error != 0:
            raise KernelError(
                f"{self.name}: {error_name(error)} (grid {(grid_x, grid_y, grid_z)}, block {block}, "
                f"{smem} bytes of shared memory)"
            )
        return 0


cdef int set_words(
    int device_id, uintptr_t to, const unsigned int* words, int words_each, size_t count, uintptr_t stream
) except -1:
    """``count`` elements at ``to`` get the same words, on ``stream``; their device need not be the current one."""
    cdef void* context = primary_context(device_id)
    cdef void* current = NULL
    cdef int error = 0, i
    driver.get_context(&current)
    if current != context:
        driver.set_context(context)
    if words_each == 1:
        error = driver.set_memory(to, words[0], count, <void*>stream)
    else:
        for i in range(words_each):
            if error == 0:
                error = driver.set_memory_2d(to + 4 * i, 4 * words_each, words[i], 1, count, <void*>stream)
    if current != context and current != NULL:
        driver.set_context(current)
    if error != 0:
        raise KernelError(f"setting {count} elements of memory: {error_name(error)}")
    return 0


cdef str error_name(int error):
    cdef const char* text = NULL
    driver.error_name(error, &text)
    return text.decode() if text != NULL else str(error)


cdef Kernel kernel(str file, str entry, tuple defines, int device_id, unsigned int dynamic_smem):
    """The variant, compiled and loaded at its first use."""
    cdef tuple key = (file, entry, defines, device_id)
    cdef object found = kernels.get(key)
    cdef Kernel made
    if found is not None:
        return <Kernel>found
    keep_alive, address = load_function(file, entry, defines, device_id, dynamic_smem)
    made = Kernel.__new__(Kernel)
    made.function = <void*><uintptr_t>address
    made.keep_alive = keep_alive
    made.name = entry
    made.context = primary_context(device_id)
    made.starts_early = (
        compute_capability(device_id) >= EARLY_START_CAPABILITY
        and import_cupy().cuda.runtime.driverGetVersion() >= EARLY_START_DRIVER
    )
    # of threads that come to it at the same time all get the first one's
    return <Kernel>kernels.setdefault(key, made)


cdef void* primary_context(int device_id) except? NULL:
    cdef object address = contexts.get(device_id)
    cdef void* context = NULL
    if address is None:
        drive()
        cupy = import_cupy()
        with cupy.cuda.Device(device_id):
            cupy.cuda.runtime.free(0)  # makes it current
            driver.get_context(&context)
        address = contexts[device_id] = <uintptr_t>context
    return <void*><uintptr_t>address


cdef int ensure_context(int device_id) except -1:
    """A thread without any context, such as autograd's, gets the device's."""
    cdef void* current = NULL
    drive().get_context(&current)
    if current == NULL:
        cupy = import_cupy()
        with cupy.cuda.Device(device_id):
            cupy.cuda.runtime.free(0)
    return 0


cdef int compute_capability(int device_id) except -1:
    """90 for sm_90, and so on."""
    capability = capabilities.get(device_id)
    if capability is None:
        capability = int(import_cupy().cuda.Device(device_id).compute_capability)
        capabilities[device_id] = capability
    return capability


cdef int multiprocessor_count(int device_id) except -1:
    count = multiprocessors.get(device_id)
    if count is None:
        cupy = import_cupy()
        count = cupy.cuda.runtime.getDeviceProperties(device_id)["multiProcessorCount"]
        multiprocessors[device_id] = count
    return count
