"""An array of any framework as pointer, shape, dtype and device; and new arrays of the caller's kind.

NumPy and CuPy arrays are read directly. A framework that has the DLPack exchange API (torch >= 2.10)
is spoken to in C: viewing a tensor, allocating one and asking for the current stream cost well under a
microsecond each. Anything else that has ``__dlpack__`` is crossed through NumPy or CuPy.
"""

import importlib

import numpy as np

from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF
from libc.string cimport memcpy

from .errors import (
    DeviceError,
    DTypeError,
    LayoutError,
    MissingDependencyError,
    OutOfMemoryError,
    ShapeError,
    UnsupportedError,
)

# --- DLPack's C structures (version 1; https://dmlc.github.io/dlpack/latest/c_api.html) ---

cdef struct DLVersion:
    uint32_t major
    uint32_t minor

cdef struct DLDevice:
    int32_t device_type
    int32_t device_id

cdef struct DLDataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes

cdef struct DLTensor:
    void* data
    DLDevice device
    int32_t ndim
    DLDataType dtype
    int64_t* shape
    int64_t* strides
    uint64_t byte_offset

cdef struct DLManagedTensorVersioned:
    DLVersion version
    void* manager_ctx
    void (*deleter)(DLManagedTensorVersioned*) noexcept
    uint64_t flags
    DLTensor dl_tensor

ctypedef void (*SetError)(void* error_ctx, const char* kind, const char* message) noexcept

cdef struct DLExchangeAPI:
    DLVersion version
    void* prev_api
    int (*allocate)(DLTensor*, DLManagedTensorVersioned**, void*, SetError) noexcept
    int (*managed_from_object)(void*, DLManagedTensorVersioned**) except -1
    int (*managed_to_object)(DLManagedTensorVersioned*, void**) except -1
    int (*tensor_from_object)(void*, DLTensor*) except -1
    int (*current_stream)(int32_t, int32_t, void**) except -1

cdef enum:
    DL_INT = 0
    DL_UINT = 1
    DL_FLOAT = 2
    DL_BFLOAT = 4
    DL_BOOL = 6

# --- dtypes ---

DTYPE_NAMES = ("float32", "float64", "bfloat16", "float16", "int32", "int64", "uint8")
_DTYPE_OF_NAME = {name: code for code, name in enumerate(DTYPE_NAMES)} | {"bool": <int>UINT8}

cdef int[7] _ITEMSIZE = [4, 8, 2, 2, 4, 8, 1]


cpdef int itemsize(int dtype) except -1:
    """Bytes an element of ``dtype`` takes."""
    return _ITEMSIZE[dtype]


cdef int dtype_named(object dtype, str name) except -1:
    cdef object code = _DTYPE_OF_NAME.get(str(dtype))
    if code is None:
        raise DTypeError(f"{name} has dtype {dtype}; supported: {', '.join(DTYPE_NAMES)}, bool")
    return code


cdef int dtype_from_dlpack(DLDataType dtype, str name) except -1:
    if dtype.lanes == 1:
        if dtype.code == DL_FLOAT:
            if dtype.bits == 32:
                return FLOAT32
            if dtype.bits == 64:
                return FLOAT64
            if dtype.bits == 16:
                return FLOAT16
        elif dtype.code == DL_BFLOAT and dtype.bits == 16:
            return BFLOAT16
        elif dtype.code == DL_INT:
            if dtype.bits == 32:
                return INT32
            if dtype.bits == 64:
                return INT64
        elif dtype.bits == 8 and (dtype.code == DL_UINT or dtype.code == DL_BOOL):
            return UINT8
    raise DTypeError(
        f"{name} has a dtype (DLPack code {dtype.code}, {dtype.bits} bits) that is not supported; "
        f"supported: {', '.join(DTYPE_NAMES)}, bool"
    )


cdef DLDataType dtype_to_dlpack(int dtype) noexcept:
    cdef DLDataType out
    out.bits = <uint8_t>(8 * _ITEMSIZE[dtype])
    out.lanes = 1
    if dtype == BFLOAT16:
        out.code = DL_BFLOAT
    elif dtype == UINT8:
        out.code = DL_UINT
    elif dtype == INT32 or dtype == INT64:
        out.code = DL_INT
    else:
        out.code = DL_FLOAT
    return out


cdef object numpy_dtype(int dtype):
    """The NumPy (and CuPy) dtype; bfloat16 is ml_dtypes' extension type."""
    if dtype != BFLOAT16:
        return np.dtype(DTYPE_NAMES[dtype])
    try:
        import ml_dtypes
    except ImportError:
        raise MissingDependencyError(
            "bfloat16 arrays of NumPy and CuPy need ml_dtypes: pip install ml-dtypes"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


# --- Array ---

cdef class Array:
    """A C-contiguous array of any framework, seen as pointer, shape, dtype and device."""

    def __dealloc__(self):
        cdef DLManagedTensorVersioned* managed = <DLManagedTensorVersioned*>self.managed
        if managed != NULL and managed.deleter != NULL:
            managed.deleter(managed)

    @property
    def shape(self):
        return tuple([self.dims[i] for i in range(self.ndim)])

    @property
    def size(self):
        cdef int64_t n = 1
        cdef int i
        for i in range(self.ndim):
            n *= self.dims[i]
        return n

    @property
    def nbytes(self):
        return self.size * _ITEMSIZE[self.dtype]

    @property
    def ptr(self):
        return <uintptr_t>self.data

    @property
    def dtype_name(self):
        return DTYPE_NAMES[self.dtype]

    @property
    def device(self):
        return "cpu" if self.device_type == CPU else f"cuda:{self.device_id}"

    cpdef Array at(self, int64_t offset, tuple shape, int dtype):
        """The view of ``shape`` and ``dtype`` that starts ``offset`` bytes into this array."""
        cdef Array part = new_array(shape, dtype, self.device_type, self.device_id)
        part.data = self.data + offset if self.data != NULL else NULL
        part.owner = self
        return part

    def __repr__(self):
        return f"Array({self.dtype_name}, shape={self.shape}, device={self.device})"


cdef Array new_array(tuple shape, int dtype, int device_type, int device_id):
    cdef Array array = Array.__new__(Array)
    cdef int i
    cdef int ndim = <int>len(shape)
    array.ndim = ndim
    for i in range(ndim):
        array.dims[i] = shape[i]
    for i in range(ndim, MAX_NDIM):
        array.dims[i] = 1
    array.dtype = dtype
    array.device_type = device_type
    array.device_id = device_id
    return array


cdef int check_rank(Py_ssize_t ndim, str name) except -1:
    if ndim > MAX_NDIM:
        raise ShapeError(f"{name} has {ndim} dimensions; at most {MAX_NDIM} are supported")
    return 0


cdef object not_contiguous(str name):
    return LayoutError(f"{name} is not C-contiguous; pass a contiguous copy of it")


cdef Array aligned(Array array, str name):
    """The array, if its elements stand at multiples of their size, as the kernels' accesses need."""
    if <uintptr_t>array.data % _ITEMSIZE[array.dtype]:
        raise LayoutError(f"{name} is not aligned to its {array.dtype_name} elements; pass a copy of it")
    return array


# --- viewing ---

cdef Array view_numpy(object obj, str name):
    check_rank(obj.ndim, name)
    if not obj.flags.c_contiguous:
        raise not_contiguous(name)
    cdef Array array = new_array(obj.shape, dtype_named(obj.dtype, name), CPU, 0)
    array.data = <char*><uintptr_t>obj.__array_interface__["data"][0]
    array.owner = obj
    return aligned(array, name)


cdef Array view_cupy(object obj, str name):
    check_rank(obj.ndim, name)
    if not obj.flags.c_contiguous:
        raise not_contiguous(name)
    cdef Array array = new_array(obj.shape, dtype_named(obj.dtype, name), CUDA, obj.device.id)
    array.data = <char*><uintptr_t>obj.data.ptr
    array.owner = obj
    return aligned(array, name)


cdef Array view_exchange(object obj, str name, const DLExchangeAPI* api):
    cdef DLTensor tensor
    cdef int i
    cdef int64_t expected = 1
    cdef bint contiguous = True
    try:
        api.tensor_from_object(<PyObject*>obj, &tensor)
    except (BufferError, RuntimeError) as error:  # on the meta device, for example
        reason = str(error).partition("\n")[0]
        raise DeviceError(f"{name} has no memory that can be read here ({reason})") from None
    check_rank(tensor.ndim, name)
    cdef Array array = Array.__new__(Array)
    array.ndim = tensor.ndim
    array.dtype = dtype_from_dlpack(tensor.dtype, name)
    array.device_type = tensor.device.device_type
    array.device_id = tensor.device.device_id
    check_device(array.device_type, name)
    for i in range(MAX_NDIM):
        array.dims[i] = tensor.shape[i] if i < tensor.ndim else 1
    if tensor.strides != NULL:
        for i in range(tensor.ndim - 1, -1, -1):
            if tensor.shape[i] == 0:
                contiguous = True
                break
            if tensor.shape[i] != 1 and tensor.strides[i] != expected:
                contiguous = False
            expected *= tensor.shape[i]
    if not contiguous:
        raise not_contiguous(name)
    array.data = <char*>tensor.data + tensor.byte_offset if tensor.data != NULL else NULL
    array.owner = obj
    return aligned(array, name)


cdef int check_device(int device_type, str name) except -1:
    if device_type != CPU and device_type != CUDA:
        raise DeviceError(
            f"{name} lives on a device of DLPack type {device_type}; supported: CPU (1) and CUDA (2)"
        )
    return 0


cdef dict _exchange_apis = {}  # type -> address of its exchange API, 0 where it has none


cdef const DLExchangeAPI* exchange_api(type kind) except? NULL:
    cdef object address = _exchange_apis.get(kind)
    cdef DLExchangeAPI* api
    if address is None:
        capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
        address = 0
        if capsule is not None:
            api = <DLExchangeAPI*>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
            while api != NULL and api.version.major > 1:  # newer layouts link to the ones before them
                api = <DLExchangeAPI*>api.prev_api
            address = <uintptr_t>api
        _exchange_apis[kind] = address
    return <const DLExchangeAPI*><uintptr_t>address


cdef bint is_cupy(object obj):
    # by name, so that CuPy is not imported for those who do not use it
    return type(obj).__name__ == "ndarray" and type(obj).__module__.startswith("cupy")


cdef object cross_dlpack(object obj, str name):
    """A NumPy or CuPy array over the memory of an object that only speaks ``__dlpack__``."""
    if not hasattr(obj, "__dlpack__"):
        raise DTypeError(
            f"{name} is a {type(obj).__module__}.{type(obj).__qualname__}; "
            "pass a NumPy, CuPy or torch array, or anything with __dlpack__"
        )
    device_type = int(obj.__dlpack_device__()[0])
    check_device(device_type, name)
    if device_type == CUDA:
        return import_cupy().from_dlpack(obj)
    try:
        return np.from_dlpack(obj)
    except (BufferError, RuntimeError, TypeError) as error:
        raise DTypeError(f"{name}: NumPy cannot view it through DLPack ({error})") from error


cdef object import_cupy():
    try:
        import cupy
    except ImportError:
        raise MissingDependencyError(
            "arrays on an NVIDIA GPU need CuPy: pip install 'ffmoe[cuda12]' or 'ffmoe[cuda13]', "
            "whichever CUDA the driver supports"
        ) from None
    return cupy


cdef Array view(object obj, str name):
    """``obj`` as an Array; ``name`` is what an error calls it."""
    if isinstance(obj, np.ndarray):
        return view_numpy(obj, name)
    cdef const DLExchangeAPI* api = exchange_api(type(obj))
    if api != NULL:
        return view_exchange(obj, name, api)
    if is_cupy(obj):
        return view_cupy(obj, name)
    other = cross_dlpack(obj, name)
    return view_numpy(other, name) if isinstance(other, np.ndarray) else view_cupy(other, name)


# --- allocating ---

cdef class Space:
    """Where new arrays come from: one framework's allocator, on one device, for one stream."""

    cpdef Array empty(self, tuple shape, int dtype):
        """An uninitialised Array."""
        raise NotImplementedError

    cpdef object export(self, Array array):
        """The caller's own kind of array for one that ``empty`` made."""
        raise NotImplementedError

    cpdef object to_host(self, Array array):
        """A NumPy copy of the array. Waits for the device."""
        host = np.empty(array.shape, numpy_dtype(array.dtype))
        cdef uintptr_t to = host.__array_interface__["data"][0]
        if array.size == 0:
            return host
        if self.device_type == CPU:
            memcpy(<void*>to, array.data, array.nbytes)
            return host
        runtime = import_cupy().cuda.runtime
        runtime.memcpyAsync(to, <uintptr_t>array.data, array.nbytes, runtime.memcpyDeviceToHost, self.stream)
        runtime.streamSynchronize(self.stream)
        return host


cdef class NumpySpace(Space):
    def __cinit__(self):
        self.device_type = CPU

    cpdef Array empty(self, tuple shape, int dtype):
        try:
            return view_numpy(np.empty(shape, numpy_dtype(dtype)), "new array")
        except MemoryError as error:
            raise OutOfMemoryError(f"no room on the host for an array of shape {shape}") from error

    cpdef object export(self, Array array):
        return array.owner


cdef class CupySpace(Space):
    cdef object cupy

    def __cinit__(self, int device_id):
        self.cupy = import_cupy()
        self.device_type = CUDA
        self.device_id = device_id
        self.stream = self.cupy.cuda.get_current_stream(device_id).ptr

    cpdef Array empty(self, tuple shape, int dtype):
        cdef object cupy = self.cupy
        try:
            if cupy.cuda.runtime.getDevice() == self.device_id:
                return view_cupy(cupy.empty(shape, numpy_dtype(dtype)), "new array")
            with cupy.cuda.Device(self.device_id):
                return view_cupy(cupy.empty(shape, numpy_dtype(dtype)), "new array")
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise OutOfMemoryError(str(error)) from error

    cpdef object export(self, Array array):
        return array.owner


cdef class DLPackSpace(Space):
    """A framework without the exchange API: memory is NumPy's or CuPy's and crosses by ``from_dlpack``."""

    cdef Space inner
    cdef object from_dlpack

    def __cinit__(self, object obj, Space inner):
        self.inner = inner
        self.device_type = inner.device_type
        self.device_id = inner.device_id
        self.stream = inner.stream
        module = importlib.import_module(type(obj).__module__.partition(".")[0])
        if hasattr(obj, "__array_namespace__"):
            module = obj.__array_namespace__()
        self.from_dlpack = getattr(module, "from_dlpack", None)
        if self.from_dlpack is None:
            raise UnsupportedError(
                f"{module.__name__} has no from_dlpack, so results cannot be returned in its own kind"
            )

    cpdef Array empty(self, tuple shape, int dtype):
        return self.inner.empty(shape, dtype)

    cpdef object export(self, Array array):
        return self.from_dlpack(array.owner)


cdef class ExchangeSpace(Space):
    """A framework's allocator, reached through the DLPack exchange API."""

    cdef const DLExchangeAPI* api

    cpdef Array empty(self, tuple shape, int dtype):
        cdef Array array = new_array(shape, dtype, self.device_type, self.device_id)
        cdef DLTensor prototype
        cdef DLManagedTensorVersioned* managed = NULL
        cdef list errors = []
        prototype.data = NULL
        prototype.device = DLDevice(self.device_type, self.device_id)
        prototype.ndim = array.ndim
        prototype.dtype = dtype_to_dlpack(dtype)
        prototype.shape = array.dims
        prototype.strides = NULL
        prototype.byte_offset = 0
        if self.api.allocate(&prototype, &managed, <PyObject*>errors, collect_error) != 0 or managed == NULL:
            message = errors[0] if errors else f"allocation of an array of shape {shape} failed"
            raise OutOfMemoryError(message)
        array.managed = managed
        array.data = <char*>managed.dl_tensor.data
        if array.data != NULL:
            array.data += managed.dl_tensor.byte_offset
        return array

    cpdef object export(self, Array array):
        cdef void* obj = NULL
        if array.managed == NULL:
            return array.owner
        managed = <DLManagedTensorVersioned*>array.managed
        array.managed = NULL  # the call below takes it over
        self.api.managed_to_object(managed, &obj)
        array.owner = <object>obj
        Py_DECREF(array.owner)  # the reference that came with obj is now the attribute's
        return array.owner


cdef void collect_error(void* errors, const char* kind, const char* message) noexcept:
    (<list><object>errors).append(f"{kind.decode(errors='replace')}: {message.decode(errors='replace')}")


cdef Space space_of(object obj, Array array):
    """The Space of ``obj``, of which ``array`` is the view."""
    cdef ExchangeSpace exchange
    cdef void* stream = NULL
    cdef const DLExchangeAPI* api
    if isinstance(obj, np.ndarray):
        return NumpySpace()
    api = exchange_api(type(obj))
    if api != NULL:
        exchange = ExchangeSpace.__new__(ExchangeSpace)
        exchange.api = api
        exchange.device_type = array.device_type
        exchange.device_id = array.device_id
        if array.device_type == CUDA:
            api.current_stream(CUDA, array.device_id, &stream)
            exchange.stream = <uintptr_t>stream
        return exchange
    inner = NumpySpace() if array.device_type == CPU else CupySpace(array.device_id)
    return inner if is_cupy(obj) else DLPackSpace(obj, inner)


def as_array(obj, name="array"):
    """``obj`` as an Array and its Space: ``view`` and ``space_of`` for callers in Python."""
    cdef Array array = view(obj, name)
    return array, space_of(obj, array)
