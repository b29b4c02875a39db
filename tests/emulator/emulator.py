"""Run the kernels on NumPy arrays, on a CPU: their sources compiled as C++ for the machine of machine.h.

``prepare()`` makes a folder to compile in; ``install()`` puts it in the place of the driver and the compiler, for the
rest of the process.
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
from ffmoe_core.cuda import launch, tensor_map, tiles
from ffmoe_core.cuda.backend import CudaBackend
from ffmoe_core.cuda.compile import kernel_directory

HERE = Path(__file__).parent
MULTIPROCESSORS = 4  # two clusters
# Fibers are changed by longjmp, from stack to stack, which a fortified library takes for an error.
OPTIONS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-w",
    "-Wno-psabi",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
)

# FFMOE_ASAN=1: accesses outside of arrays are errors. Stacks are left out, which fibers would confuse.
ASAN = os.environ.get("FFMOE_ASAN") == "1"
if ASAN:
    OPTIONS += ("-g1", "-fsanitize=address", "--param=asan-stack=0", "--param=asan-globals=0")


class CuLaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class CuLaunchConfig(ctypes.Structure):
    _fields_ = [
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(CuLaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


CuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(CuLaunchConfig), *[ctypes.c_void_p] * 3)
PROGRAMMATIC_STREAM_SERIALIZATION = 6
CuMemsetD32Async = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
)
CuMemsetD2D32Async = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint, *[ctypes.c_size_t] * 2, ctypes.c_void_p
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
Launch = ctypes.CFUNCTYPE(None, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p)


@CuLaunchKernelEx
def launch_kernel(config, function, parameters, _extra):
    """Attributes change nothing here, where a kernel is over when its launch returns."""
    launch = config[0]
    asked = [(each.id, each.value[0]) for each in launch.attributes[: launch.num_attributes]]
    if launch.grid_z != 1 or (launch.block_y, launch.block_z) != (1, 1):
        return 1  # CUDA_ERROR_INVALID_VALUE
    if asked != [(PROGRAMMATIC_STREAM_SERIALIZATION, 1)]:
        return 1
    Launch(function)(launch.grid_x, launch.grid_y, launch.block_x, parameters)
    return 0


@CuMemsetD32Async
def set_memory(to, value, count, _stream):
    ctypes.memmove(to, struct.pack("I", value) * count, 4 * count)
    return 0


@CuMemsetD2D32Async
def set_memory_2d(to, pitch, value, width, height, stream):
    for row in range(height):
        set_memory(to + row * pitch, value, width, stream)
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
    cuLaunchKernelEx=launch_kernel,
    cuMemsetD32Async=set_memory,
    cuMemsetD2D32Async=set_memory_2d,
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
            driverGetVersion=lambda: 13000,
            free=lambda _pointer: None,
            getDeviceProperties=lambda _device: {
                "name": b"emulated",
                "major": 9,
                "minor": 0,
                "multiProcessorCount": MULTIPROCESSORS,
            },
        ),
    )
)


def prepare(folder):
    """Copy the sources and this machine to ``folder``, which is to hold what is compiled. The sources' folder."""
    shutil.copy(HERE / "machine.h", folder)
    # GCC finds it beside the header, and compiles the kernels in half of the time
    compile_source(folder / "machine.h", folder / "machine.h.gch", "-x", "c++-header")
    return copy_sources(folder / "sources")


def copy_sources(target):
    shutil.copytree(kernel_directory(), target)
    shutil.copytree(HERE / "common", target / "common", dirs_exist_ok=True)
    return target


def break_sources(target, file, old, new):
    """A copy of the sources in which text of a file is replaced."""
    copy_sources(target)
    text = (target / file).read_text()
    assert text.count(old) == 1, f"{old!r} is not, or not once, in {file}"
    (target / file).write_text(text.replace(old, new))
    return target


def compile_source(source, target, *options):
    """Another process may be at the same."""
    made = target.with_suffix(f".{os.getpid()}")
    subprocess.run(["c++", *OPTIONS, *options, "-o", str(made), str(source)], check=True)
    made.replace(target)


def install(sources):
    """Compile kernels of ``sources``, into the folder around it."""
    sources = Path(sources)
    folder = sources.parent
    headers = [path.read_bytes() for path in sorted((sources / "common").iterdir())]

    def load_function(file, entry, defines, _device_id, _dynamic_smem):
        what = repr((file, entry, defines)).encode()
        name = hashlib.sha256(b"".join([what, (sources / file).read_bytes(), *headers])).hexdigest()[:16]
        library, source = folder / f"{name}.so", folder / f"{name}.{os.getpid()}.cpp"
        clustered = "true" if file.endswith("_sm90.cu") else "false"
        if not library.exists():
            source.write_text(
                f'#include "machine.h"\n#include "{file}"\n'
                'extern "C" void launch(unsigned grid_x, unsigned grid_y, unsigned threads, void** parameters) {\n'
                f"    machine::launch({entry}, {{grid_x, grid_y, 1}}, threads, {clustered}, parameters);\n}}\n"
            )
            includes = (f"-I{sources}", f"-I{folder}")
            compile_source(source, library, "-shared", *includes, *(f"-D{define}" for define in defines))
        loaded = ctypes.CDLL(str(library))
        return loaded, ctypes.cast(loaded.launch, ctypes.c_void_p).value

    backend._backend_of = lambda _device_type: CudaBackend
    launch.load_function = load_function
    launch.import_cupy = tiles.import_cupy = lambda: CUPY
    for module in (launch, tensor_map):
        module.ctypes = SimpleNamespace(CDLL=lambda _name: DRIVER, cast=ctypes.cast, c_void_p=ctypes.c_void_p)


def set_seed(seed):
    """The schedules of the kernels launched from now on."""
    os.environ["FFMOE_EMULATOR_SEED"] = str(seed)
