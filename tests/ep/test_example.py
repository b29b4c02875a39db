"""examples/expert_parallel.py learns under mpirun and under torchrun."""

import re
import sys

import pytest

from tests.ep.launch import finish, launch, mpirun

EXAMPLE = ("examples/expert_parallel.py", "--cpu")
LAUNCHERS = {
    "mpirun": lambda: (mpirun(), "-n", 3, sys.executable),
    "torchrun": lambda: (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_it_learns(launcher):
    process = launch(*LAUNCHERS[launcher](), *EXAMPLE)
    output, ended = finish(process, 120)
    assert ended, output
    assert process.returncode == 0, output
    losses = [float(loss) for loss in re.findall(r"squared error ([\d.]+)", output)]
    assert losses[-1] < losses[0] / 20
    assert "unexplained variance" in output
