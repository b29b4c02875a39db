"""Cases run in processes of their own: a kernel that hangs or crashes ends one of them."""

import os
import subprocess
import sys
from pathlib import Path

# 50 is what a change to Hopper's kernels should stand: FFMOE_SCHEDULES=50
SCHEDULES = int(os.environ.get("FFMOE_SCHEDULES", "2"))
TIMEOUT = 300 + 10 * SCHEDULES


def run(module, sources, schedules, *arguments):
    """What a module of this package printed, and its exit status."""
    command = [sys.executable, "-m", f"tests.emulator.{module}", sources, str(schedules), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    return ended.stdout + ended.stderr, ended.returncode
