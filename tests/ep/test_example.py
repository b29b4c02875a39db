"""The examples under mpirun, and under torchrun: they learn, and learn what one process learns."""

import re
import sys

import pytest
import torch

from tests.ep.launch import Launch, mpirun

EXAMPLE = ("examples/expert_parallel.py", "--cpu")
LAUNCHERS = {
    "mpirun": lambda: (mpirun(), "-n", 3, sys.executable),
    "torchrun": lambda: (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_it_learns(launcher):
    process = Launch(*LAUNCHERS[launcher](), *EXAMPLE)
    output, ended = process.finish(120)
    assert ended, output
    assert process.returncode == 0, output
    losses = [float(loss) for loss in re.findall(r"squared error ([\d.]+)", output)]
    assert losses[-1] < losses[0] / 20
    assert "unexplained variance" in output


SIZES = {"layers": 2, "width": 32, "hidden": 16, "experts": 5, "context": 32, "batch": 4}
TINY = ["--device", "cpu", *(word for name, size in SIZES.items() for word in (f"--{name}", size))]


def test_the_demo_on_two_processes(tmp_path):
    """Step by step the run of one process; stopped and resumed it goes on."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)

    def train(folder, ranks, *options):
        command = (sys.executable, "examples/train_lm.py", "--out", tmp_path / folder, *TINY, *options)
        process = Launch(*((mpirun(), "-n", ranks) if ranks > 1 else ()), *command, "--text", text)
        output, ended = process.finish(120)
        assert ended, output
        return output, process.returncode

    for folder, ranks in (("one", 1), ("two", 2)):
        output, code = train(folder, ranks, "--steps", 12)
        assert code == 0, output
        assert output.count("Held-out bits a byte") == 1
        assert (tmp_path / folder / "report.html").exists()
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert two["history"]["train"] == pytest.approx(one["history"]["train"], rel=1e-4)
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-2, atol=1e-4)

    output, code = train("two", 2, "--steps", 12, "--resume")
    assert code == 0, output
    output, code = train("two", 1, "--steps", 12, "--resume")
    assert code == 2
    assert "2 processes, this one has 1" in output
    output, code = train("odd", 2, "--batch", 3)
    assert code == 2
    assert "--batch 3 is not a multiple of the 2 processes" in output
