"""What every recorded measurement says of itself: when, on what, with which versions, of which sources."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = ("kernels", "ffmoe_core", "ffmoe_torch", "tests", "benchmarks")
SUFFIXES = {".cu", ".cuh", ".h", ".pxd", ".py", ".pyi", ".pyx"}
PACKAGES = ("torch", "cupy-cuda12x", "cupy-cuda13x", "numpy", "scipy", "cython", "hypothesis", "pytest")


def environment() -> dict[str, Any]:
    """The device (or processor), its driver, and the versions of what computes."""
    gpu = _nvidia_smi("name,driver_version,compute_cap")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = {"processor": _processor(), "cores": os.cpu_count()}
    if gpu:
        device, driver, capability = gpu
        machine |= {"device": device, "driver": driver, "compute_capability": capability}
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **machine, "versions": versions}


def sources_digest() -> str:
    """sha256 over path and content of everything a result depends on; build products left out."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            # beside x.pyx, x.c is generated; a suffix list is enough to leave it out
            if path.suffix in SUFFIXES:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode())
                digest.update(content)
    return digest.hexdigest()


def write(path: Path, data: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n")
    partial.replace(path)


def _nvidia_smi(fields: str) -> list[str] | None:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [value.strip() for value in output.strip().split(",")]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
