"""examples/cupy_moe.py: the core trained by hand, with no framework loaded."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("modules:", *(name for name in ("torch", "cupy") if name in sys.modules))
"""


def run(*options):
    script = SCRIPT.replace("sys.argv[0]", repr(str(ROOT / "examples" / "cupy_moe.py")))
    return subprocess.run(
        [sys.executable, "-c", script, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("options", "modules"),
    [pytest.param(["--cpu"], "", id="cpu"), pytest.param([], " cupy", id="gpu", marks=pytest.mark.gpu)],
)
def test_it_learns_without_torch(options, modules):
    done = run(*options)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"squared error ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0] / 20
    assert done.stdout.splitlines()[-1].removeprefix("modules:") == modules
