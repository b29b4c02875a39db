"""Start Python on several ranks with the mpirun that an MPI wheel brought."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def mpirun():
    """The launcher that stands beside this Python, or is on the PATH."""
    found = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if found is None:
        pytest.fail(
            "mpirun is not installed; it comes with the extra: pip install -e '.[dev]'", pytrace=False
        )
    return found


def start(size, *command):
    """``mpirun -n size python *command``."""
    return Launch(mpirun(), "-n", size, sys.executable, *command)


class Launch(subprocess.Popen):
    """A command with one thread a rank, and a mark in its environment that all it starts inherit.

    Parentage and session would not find them all: mpirun's ranks outlive their parent, torchrun's have sessions of
    their own.
    """

    def __init__(self, *command):
        self.mark = f"FFMOE_TEST_LAUNCH={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        super().__init__(
            list(map(str, command)),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def alive(self):
        """The processes of this command: itself and all that it started."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def stop(self):
        """Kill all of it, stopped processes too."""
        while alive := self.alive():
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def finish(self, timeout):
        """What it printed, and whether it ended by itself; nothing of it is left behind."""
        try:
            return self.communicate(timeout=timeout)[0], True
        except subprocess.TimeoutExpired:
            self.stop()
            return self.communicate()[0], False
