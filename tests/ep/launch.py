"""Start Python on several ranks with the mpirun that an MPI wheel brought."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
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
    return launch(mpirun(), "-n", size, sys.executable, *command)


def launch(*command):
    """A process in a session of its own, with one thread a rank."""
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout):
    """What it printed, and whether it ended by itself; nothing of it is left behind."""
    try:
        output, _ = process.communicate(timeout=timeout)
        return output, True
    except subprocess.TimeoutExpired:
        stop(process)
        return process.communicate()[0], False


def stop(process):
    """Kill the launcher and its ranks, which share its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(session):
    """Processes of a session: a launcher gives each rank a process group of its own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                found.append(int(folder.name))
    return found
