"""Every variant of every kernel compiles for every architecture: NVRTC through ctypes, no GPU and no CuPy."""

import ctypes
import functools
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ffmoe_core.cuda import (
    dense_gemm,
    dispatch,
    gate_logits_sm90,
    gate_wgrad_sm90,
    grouped_gemm,
    grouped_gemm_sm90,
    permute,
    routing,
)
from ffmoe_core.cuda.compile import compile_options, kernel_directory, only_architecture

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
STAGES = (
    routing,
    permute,
    dispatch,
    grouped_gemm,
    grouped_gemm_sm90,
    dense_gemm,
    gate_logits_sm90,
    gate_wgrad_sm90,
)


def libraries():
    """Where NVRTC may be: in NVIDIA's wheels, then wherever the loader looks."""
    try:
        import nvidia
    except ImportError:
        return ["libnvrtc.so"]
    wheels = (Path(folder) for folder in nvidia.__path__)
    return [*map(str, sorted(p for w in wheels for p in w.glob("*/lib/libnvrtc.so.*"))), "libnvrtc.so"]


class Nvrtc:
    """The few calls that turn a source into a binary."""

    def __init__(self, library):
        self.library = library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *args):
        status = getattr(self.library, name)(*args)
        return "" if status == 0 else f"{name}: {self.library.nvrtcGetErrorString(status).decode()}"

    def text(self, what, program):
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, source, options):
        """The binary, and what went wrong."""
        program = ctypes.c_void_p()
        error = self.call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), None, 0, None, None)
        assert not error, error
        encoded = [option.encode() for option in options]
        array = (ctypes.c_char_p * len(encoded))(*encoded)
        try:
            error = self.call("nvrtcCompileProgram", program, len(encoded), array)
            if error:
                return b"", f"{error}\n{self.text('ProgramLog', program).decode()}"
            return self.text("CUBIN", program), ""
        finally:
            self.call("nvrtcDestroyProgram", ctypes.byref(program))


@pytest.fixture(scope="module")
def nvrtc():
    for library in libraries():
        try:
            return Nvrtc(ctypes.CDLL(library))
        except OSError:
            continue
    if sys.platform == "linux":
        pytest.fail("NVRTC is not installed; it comes with the extra: pip install -e '.[dev]'", pytrace=False)
    pytest.skip("NVIDIA has no NVRTC for this system")


@functools.cache
def modules():
    """(file, defines) -> the entries that are launched from it."""
    found = defaultdict(set)
    for stage in STAGES:
        for file, entry, defines in stage.variants():
            found[file, defines].add(entry)
    return dict(found)


def compile_module(nvrtc, architecture, file, defines, entries):
    """What is wrong with one variant; empty if nothing is."""
    source = (kernel_directory() / file).read_text()
    options = compile_options(file, defines)
    if only_architecture(file) is None:
        options += (f"-arch={architecture}",)
    binary, error = nvrtc.compile(source, options)
    name = f"{file} {' '.join(defines)}"
    if error:
        return f"{name}\n{error}"
    missing = [entry for entry in sorted(entries) if b".text." + entry.encode() + b"\0" not in binary]
    return f"{name}\nhas no kernel {', '.join(missing)}" if missing else ""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles(nvrtc, architecture):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(compile_module, nvrtc, architecture, file, defines, entries)
            for (file, defines), entries in modules().items()
            if only_architecture(file) in (None, architecture)
        ]
        errors = [job.result() for job in jobs]
    assert not any(errors), "\n\n".join(filter(None, errors))


def test_a_broken_kernel_is_seen(nvrtc):
    binary, error = nvrtc.compile("__global__ void broken() { undeclared(); }", ("-arch=sm_80",))
    assert not binary
    assert "undeclared" in error


def test_every_source_has_variants():
    assert {file for file, _ in modules()} == {path.name for path in kernel_directory().glob("*.cu")}


def test_variants_need_no_cupy():
    """Listing them must work where CuPy is not installed."""
    names = ", ".join(stage.__name__ for stage in STAGES)
    code = (
        f"import sys; sys.modules['cupy'] = None\nimport {names}\nassert all(s.variants() for s in ({names}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
