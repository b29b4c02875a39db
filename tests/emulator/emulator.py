"""Run the Hopper kernels on NumPy arrays, on a CPU: their sources compiled as C++ for the machine of machine.h.

``install()`` puts it in the place of the driver and the compiler, for the rest of the process.
"""

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

from ffmoe_core import backend
from ffmoe_core.cuda import launch, tensor_map
from ffmoe_core.cuda.backend import CudaBackend
from ffmoe_core.cuda.compile import kernel_directory

HERE = Path(__file__).parent
MULTIPROCESSORS = 4  # two clusters
# Fibers are changed by longjmp, from stack to stack, which a fortified library takes for an error.
OPTIONS = (
    "-std=c++17",
    "-O2",
    "-shared",
    "-fPIC",
    "-w",
    "-Wno-psabi",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
)

CuLaunchKernel = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)
CuMemsetD32Async = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
)
CuCtxGetCurrent = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
CuCtxSetCurrent = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
CuGetErrorName = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
CuTensorMapEncodeTiled = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p),
    *[ctypes.POINTER(ctypes.c_uint64)] * 2,
    *[ctypes.POINTER(ctypes.c_uint)] * 2,
    *[ctypes.c_int] * 4,
)
Launch = ctypes.CFUNCTYPE(None, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p)


@CuLaunchKernel
def launch_kernel(function, grid, grid_y, _grid_z, threads, *rest):
    if grid_y != 1:
        return 1  # CUDA_ERROR_INVALID_VALUE
    parameters = rest[4]
    Launch(function)(grid, threads, parameters)
    return 0


@CuMemsetD32Async
def set_memory(to, value, count, _stream):
    ctypes.memmove(to, struct.pack("I", value) * count, 4 * count)
    return 0


@CuCtxGetCurrent
def get_context(context):
    context[0] = 1
    return 0


@CuTensorMapEncodeTiled
def encode_tiled(out, _dtype, rank, array, sizes, strides, box, *_):
    """What tma.cuh reads, where the driver would take such a map."""
    aligned = array % 16 == 0 and strides[0] % 16 == 0 and strides[1] % 16 == 0
    if rank != 3 or box[0] != 64 or box[1] > 256 or not aligned or 0 in sizes[:3]:
        return 1  # CUDA_ERROR_INVALID_VALUE
    ctypes.memmove(out, struct.pack("P5QI", array, *sizes[:3], *strides[:2], box[1]), 52)
    return 0


DRIVER = SimpleNamespace(
    cuLaunchKernel=launch_kernel,
    cuMemsetD32Async=set_memory,
    cuCtxGetCurrent=get_context,
    cuCtxSetCurrent=CuCtxSetCurrent(lambda _context: 0),
    cuGetErrorName=CuGetErrorName(lambda _error, _name: 0),
    cuTensorMapEncodeTiled=encode_tiled,
)


class Device:
    """In the place of CuPy's."""

    compute_capability = "90"

    def __init__(self, device_id):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


CUPY = SimpleNamespace(
    cuda=SimpleNamespace(
        Device=Device,
        runtime=SimpleNamespace(
            free=lambda _pointer: None,
            getDeviceProperties=lambda _device: {"multiProcessorCount": MULTIPROCESSORS},
        ),
    )
)


def install(folder, broken=()):
    """Compile in ``folder``, which may hold what was compiled before. ``broken``: (text of a source, another)."""
    sources = Path(folder, "sources")
    sources.parent.mkdir(exist_ok=True)
    shutil.copytree(kernel_directory(), sources, dirs_exist_ok=True)
    shutil.copytree(HERE / "common", sources / "common", dirs_exist_ok=True)
    if broken:
        old, new = broken
        kernel = sources / "grouped_gemm_sm90.cu"
        assert kernel.read_text().count(old) == 1, f"{old!r} is not, or not once, in {kernel.name}"
        kernel.write_text(kernel.read_text().replace(old, new))

    def load_function(file, entry, defines, _device_id, _dynamic_smem):
        name = hashlib.sha256(repr((file, entry, defines, broken)).encode()).hexdigest()[:16]
        library, source = Path(folder, f"{name}.so"), Path(folder, f"{name}.cpp")
        clustered = "true" if file.endswith("_sm90.cu") else "false"
        if not library.exists():
            source.write_text(
                f'#include "machine.h"\n#include "{file}"\n'
                'extern "C" void launch(unsigned grid, unsigned threads, void** parameters) {\n'
                f"    machine::launch({entry}, grid, threads, {clustered}, parameters);\n}}\n"
            )
            includes = (f"-I{HERE}", f"-I{sources}", *(f"-D{define}" for define in defines))
            made = library.with_suffix(".new")
            subprocess.run(["c++", *OPTIONS, *includes, "-o", str(made), str(source)], check=True)
            made.rename(library)
        loaded = ctypes.CDLL(str(library))
        return loaded, ctypes.cast(loaded.launch, ctypes.c_void_p).value

    backend._backend_of = lambda _device_type: CudaBackend
    launch.load_function = load_function
    launch.import_cupy = lambda: CUPY
    for module in (launch, tensor_map):
        module.ctypes = SimpleNamespace(CDLL=lambda _name: DRIVER, cast=ctypes.cast, c_void_p=ctypes.c_void_p)


def set_seed(seed):
    """The schedules of the kernels launched from now on."""
    os.environ["FFMOE_EMULATOR_SEED"] = str(seed)
