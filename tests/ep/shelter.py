"""``python -m tests.ep.shelter FOLDER COMMAND...``: run a rank as a child whose death no launcher sees.

A launcher that sees a rank die ends the others, which then could not say what they saw. FOLDER gets the child's
exit code as PID.rc; this process stays until it is killed.
"""

import signal
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    folder, *command = sys.argv[1:]
    child = subprocess.Popen([sys.executable, *command], close_fds=False)  # the launcher's sockets go along
    code = child.wait()
    part = Path(folder, f"{child.pid}.part")
    part.write_text(str(code))
    part.rename(Path(folder, f"{child.pid}.rc"))
    signal.pause()
