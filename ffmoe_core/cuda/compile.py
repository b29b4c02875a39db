"""Find, compile and keep the CUDA kernels.

NVRTC compiles one specialised variant a module, at its first use; CuPy keeps the binary on disk. CuPy is
imported here and nowhere before the first kernel is asked for.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import DeviceError, KernelError, MissingDependencyError

MINIMUM_ARCHITECTURE = 80


def kernel_directory() -> Path:
    """Where the .cu files are: inside the installed package, or at the top of a source tree."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "kernels", package.parent / "kernels"):
        if (candidate / "routing.cu").is_file():
            return candidate
    raise KernelError(f"the kernels' sources are neither in {package / 'kernels'} nor in {package.parent}")


@lru_cache(maxsize=1)
def source_digest() -> str:
    """A digest of the whole kernel tree: an edited include must not meet a cached binary."""
    digest = hashlib.sha256()
    root = kernel_directory()
    for path in sorted(p for p in root.rglob("*.cu*") if p.is_file()):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def only_architecture(file: str) -> str | None:
    """The one architecture that a kernel file is for, by the end of its name; None: all of them."""
    return "sm_90a" if file.endswith("_sm90.cu") else None


def compile_options(file: str, defines: tuple[str, ...]) -> tuple[str, ...]:
    """NVRTC's options for a variant; ``defines`` are NAME=VALUE."""
    architecture = only_architecture(file)
    return (
        "-std=c++17",
        *((f"-arch={architecture}",) if architecture else ()),
        f"-I{kernel_directory()}",
        f"-DFFMOE_KERNEL_DIGEST=0x{source_digest()}",
        *(f"-D{define}" for define in defines),
    )


def load_function(
    file: str, entry: str, defines: tuple[str, ...], device_id: int, dynamic_smem: int
) -> tuple[Any, int]:
    """Compile ``entry`` of ``file`` for a device: the object that keeps it loaded, and its CUfunction.

    Raises
    ------
    MissingDependencyError : CuPy is not installed.
    DeviceError : the GPU is older than sm_80.
    KernelError : the compiler or the driver refused it; the message holds the log.
    """
    cupy = import_cupy()
    check_architecture(cupy, device_id)
    source = (kernel_directory() / file).read_text()
    try:
        with cupy.cuda.Device(device_id):
            module = cupy.RawModule(code=source, options=compile_options(file, defines))
            kernel = module.get_function(entry)
            if dynamic_smem > 0:  # beside what is static it may be more than the driver gives unasked
                kernel.max_dynamic_shared_size_bytes = dynamic_smem
            return kernel, kernel.kernel.ptr
    except cupy.cuda.compiler.CompileException as error:
        raise KernelError(f"{file} ({', '.join(defines)}) does not compile:\n{error}") from error
    except cupy.cuda.driver.CUDADriverError as error:
        raise KernelError(f"{entry} of {file} ({', '.join(defines)}) does not load: {error}") from error


def import_cupy() -> Any:
    try:
        import cupy
    except ImportError:
        raise MissingDependencyError(
            "arrays on an NVIDIA GPU need CuPy: pip install 'ffmoe[cuda12]' or 'ffmoe[cuda13]', "
            "whichever CUDA the driver supports"
        ) from None
    return cupy


def check_architecture(cupy: Any, device_id: int) -> None:
    """The kernels need sm_80 (Ampere) or newer."""
    capability = str(cupy.cuda.Device(device_id).compute_capability)
    if int(capability) < MINIMUM_ARCHITECTURE:
        name = cupy.cuda.runtime.getDeviceProperties(device_id)["name"].decode()
        raise DeviceError(
            f"cuda:{device_id} ({name}) is sm_{capability}; the kernels need sm_{MINIMUM_ARCHITECTURE} "
            "(Ampere) or newer"
        )
