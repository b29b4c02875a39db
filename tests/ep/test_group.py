"""A layer spread over 1, 2, 3 and 4 ranks of real MPI is the layer of one process."""

import functools
import json
import tempfile
from pathlib import Path

import pytest

from tests.ep import cases_checkpoint, cases_core, cases_torch, cases_torch_nccl
from tests.ep.launch import start


def sizes(*numbers):
    """Numbers of ranks; pytest-xdist gives those that are alike to one worker (--dist loadgroup), to start MPI once."""
    return [pytest.param(size, marks=pytest.mark.xdist_group(f"{size} ranks")) for size in numbers]


@functools.cache
def verdicts(module, size, transport="mpi"):
    """What went wrong in each case of a module on ``size`` ranks: one start of MPI for all."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        output, ended = start(size, "-m", "tests.ep.runner", module.__name__, report, transport).finish(300)
        if report.exists():
            return json.loads(report.read_text())
        wrong = output if ended else f"not over after five minutes:\n{output}"
        return dict.fromkeys(module.CASES, wrong or "no report")


@pytest.mark.parametrize("size", sizes(1, 2, 3, 4))
@pytest.mark.parametrize("case", cases_core.CASES)
def test_core(size, case):
    wrong = verdicts(cases_core, size)[case]
    assert not wrong, wrong


@pytest.mark.parametrize("size", sizes(1, 2, 3, 4))
@pytest.mark.parametrize("case", cases_torch.CASES)
def test_torch(size, case):
    wrong = verdicts(cases_torch, size)[case]
    assert not wrong, wrong


@pytest.mark.xdist_group("checkpoints")
@pytest.mark.parametrize("case", cases_checkpoint.CASES)
def test_checkpoint(case):
    wrong = verdicts(cases_checkpoint, 4)[case]
    assert not wrong, wrong


def over_nccl(module, size, case):
    import cupy

    devices = cupy.cuda.runtime.getDeviceCount()
    if devices < size:
        pytest.skip(f"{devices} GPUs; NCCL wants one for each of {size} ranks")
    wrong = verdicts(module, size, "nccl")[case]
    assert not wrong, wrong


@pytest.mark.gpu
@pytest.mark.parametrize("size", sizes(1, 2, 4))
@pytest.mark.parametrize("case", cases_core.CASES)
def test_core_over_nccl(size, case):
    over_nccl(cases_core, size, case)


@pytest.mark.gpu
@pytest.mark.parametrize("size", sizes(1, 2, 4))
@pytest.mark.parametrize("case", cases_torch_nccl.CASES)
def test_torch_over_nccl(size, case):
    over_nccl(cases_torch_nccl, size, case)
