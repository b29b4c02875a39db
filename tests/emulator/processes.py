"""Cases run in processes of their own: a kernel that hangs or crashes ends one of them."""

import os
import subprocess
import sys
from pathlib import Path

from tests.emulator.emulator import ASAN

# 50 is what a change to Hopper's kernels should stand.
SCHEDULES = int(os.environ.get("FFMOE_SCHEDULES", "2"))
TIMEOUT = (300 + 10 * SCHEDULES) * (4 if ASAN else 1)


def run(module, sources, schedules, *arguments):
    """What a module of this package printed, and its exit status."""
    command = [sys.executable, "-m", f"tests.emulator.{module}", sources, str(schedules), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ASAN:  # before Python starts, to see what NumPy allocates
        library = subprocess.check_output(["c++", "-print-file-name=libasan.so"], text=True).strip()
        environment |= {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    return ended.stdout + ended.stderr, ended.returncode
