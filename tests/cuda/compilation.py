"""Every variant of every kernel, compiled for every architecture: NVRTC through ctypes, no GPU and no CuPy."""

import ctypes
import functools
import os
import threading
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ffmoe_core.cuda import (
    dense_gemm,
    dispatch,
    gate_logits_few,
    gate_logits_sm90,
    gate_wgrad_sm90,
    grouped_gemm,
    grouped_gemm_sm90,
    permute,
    router_dx,
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
    gate_logits_few,
    gate_logits_sm90,
    gate_wgrad_sm90,
    router_dx,
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


@functools.cache
def load():
    """NVRTC, or None where there is none."""
    for library in libraries():
        try:
            return Nvrtc(ctypes.CDLL(library))
        except OSError:
            continue
    return None


@functools.cache
def modules():
    """(file, defines) -> the entries that are launched from it."""
    found = defaultdict(set)
    for stage in STAGES:
        for file, entry, defines in stage.variants():
            found[file, defines].add(entry)
    return dict(found)


# What is legal does not depend on how well it is optimised, which takes most of the time. The tests on
# a GPU compile as users do.
QUICK = "--Ofast-compile=max"


def compile_module(nvrtc, architecture, file, defines, entries):
    """What is wrong with one variant; empty if nothing is."""
    source = (kernel_directory() / file).read_text()
    options = (*compile_options(file, defines), QUICK)
    if only_architecture(file) is None:
        options += (f"-arch={architecture}",)
    binary, error = nvrtc.compile(source, options)
    name = f"{file} {' '.join(defines)}"
    if error:
        return f"{name}\n{error}"
    missing = [entry for entry in sorted(entries) if b".text." + entry.encode() + b"\0" not in binary]
    return f"{name}\nhas no kernel {', '.join(missing)}" if missing else ""


class Compilations:
    """Takes minutes of several processors: with the time that other tests leave, when it is started before them."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(os.cpu_count(), initializer=_give_way)
        self._jobs: dict[str, list[Future]] = {}

    def start(self, architecture):
        if architecture not in self._jobs:
            self._jobs[architecture] = [
                self._pool.submit(compile_module, load(), architecture, file, defines, entries)
                for (file, defines), entries in modules().items()
                if only_architecture(file) in (None, architecture)
            ]

    def errors(self, architecture):
        self.start(architecture)
        return [error for job in self._jobs[architecture] if (error := job.result())]

    def cancel(self):
        self._pool.shutdown(wait=False, cancel_futures=True)


def _give_way():
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # on Linux of this thread alone
