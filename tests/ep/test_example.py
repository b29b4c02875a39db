"""The examples under mpirun, and under torchrun: they learn, and learn what one process learns."""

import re
import shlex
import shutil
import sys

import pytest
import torch

from tests.ep.launch import Launch, mpirun, start
from tests.examples.test_train_lm import same

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


def failed(process):
    """What it printed for a mistake of the user's."""
    output, ended = process.finish(60)
    assert ended, output
    assert process.returncode == 2, output
    assert "Traceback" not in output
    return output


def test_more_ranks_than_experts():
    output = failed(start(9, *EXAMPLE))
    assert "expert_parallel.py: num_experts=8 is less than ep_size=9" in output


WITHOUT = """
import runpy, sys
sys.modules[sys.argv.pop(1)] = None
sys.path.insert(0, "examples")
runpy.run_path("examples/expert_parallel.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("package", "options", "extra"), [("cupy", (), "cuda13"), ("mpi4py", ("--cpu",), "mpi")]
)
def test_a_package_is_missing(package, options, extra):
    output = failed(Launch(sys.executable, "-c", WITHOUT, package, *options))
    assert output.startswith("expert_parallel.py: ")
    assert f"pip install 'ffmoe[{extra}]'" in output
    assert output.count("\n") == 1


SIZES = {"layers": 2, "width": 32, "hidden": 16, "experts": 5, "context": 32, "batch": 4}
TINY = ["--device", "cpu", *(word for name, size in SIZES.items() for word in (f"--{name}", size))]


# examples/train_lm.py with a Ctrl-C to the second rank alone, at a step where nothing is saved but for that one
STEPS, STOP = 12, 5
STOPPING = f"""
import runpy, signal, sys
sys.argv[0] = "examples/train_lm.py"
sys.path.insert(0, "examples")
from lm.run import Run

def stopping(run, advance=Run.advance):
    loss = advance(run)
    if run.ranks.rank == 1 and run.step == {STOP}:
        signal.raise_signal(signal.SIGINT)
    return loss

Run.advance = stopping
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def run(*command):
    process = Launch(*command)
    output, ended = process.finish(120)
    assert ended, output
    assert "Traceback" not in output
    return output, process.returncode


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return path


def train(folder, text, ranks, *options, script=("examples/train_lm.py",)):
    launcher = (mpirun(), "-n", ranks) if ranks > 1 else ()
    options = ("--out", folder, *TINY, "--steps", STEPS, "--text", text, *options)
    return run(*launcher, sys.executable, *script, *options)


def whole_run(folder, text, ranks):
    output, code = train(folder, text, ranks)
    assert code == 0, output
    assert output.count("Held-out bits a byte") == 1
    assert (folder / "report.html").exists()
    return folder


@pytest.fixture(scope="module")
def two(text, tmp_path_factory):
    """The folder of a whole run of two processes."""
    return whole_run(tmp_path_factory.mktemp("two"), text, 2)


def test_the_demo_on_two_processes(text, two, tmp_path):
    """Step by step the run of one process, which two do not resume."""
    one, two = checkpoint(whole_run(tmp_path, text, 1)), checkpoint(two)
    assert two["history"]["train"] == pytest.approx(one["history"]["train"], rel=1e-4)
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-2, atol=1e-4)
    output, code = train(tmp_path / "odd", text, 2, "--batch", 3)
    assert code == 2
    assert "--batch 3 is not a multiple of the 2 processes" in output
    output, code = train(tmp_path, text, 2, "--resume")
    assert code == 2
    assert "1 processes, this one has 2" in output


# examples/train_lm.py where torch sees one GPU
ONE_GPU = """
import runpy, sys, torch
sys.argv[0] = "examples/train_lm.py"
sys.path.insert(0, "examples")
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("options", [(), ("--device", "cuda")])
def test_the_demo_on_two_processes_with_one_gpu(options):
    output = failed(start(2, "-c", ONE_GPU, *options))
    assert "2 processes on this machine need a GPU each, and 1 can be used" in output


def test_the_demo_stopped_and_resumed(text, two, tmp_path):
    output, code = train(tmp_path, text, 2, script=("-c", STOPPING))
    assert code == 130, output
    assert checkpoint(tmp_path)["step"] == STOP
    (again,) = re.findall("Go on with: mpirun (.*)", output)

    output, code = train(tmp_path, text, 1, "--resume")
    assert code == 2
    assert "2 processes, this one has 1" in output

    # as a power cut leaves it that comes when the second rank has saved, the first not yet
    mixed = tmp_path / "mixed"
    shutil.copytree(two, mixed)
    shutil.copy(tmp_path / "checkpoint.pt", mixed)
    output, code = train(mixed, text, 2, "--resume")
    assert code == 2
    assert "not of the same step of one run" in output

    output, code = run(mpirun(), *shlex.split(again))
    assert code == 0, output
    for rank in (".", "rank1"):  # each has the optimizer's state of its own experts
        resumed, straight = (checkpoint(folder / rank) for folder in (tmp_path, two))
        for state in resumed, straight:
            del state["history"]["seconds"]
        assert straight["step"] == STEPS
        assert same(resumed, straight)
