"""A layer spread over 1, 2, 3 and 4 ranks of real MPI is the layer of one process."""

import functools
import json
import tempfile
from pathlib import Path

import pytest

from tests.ep import cases_checkpoint, cases_core, cases_torch
from tests.ep.launch import start


@functools.cache
def verdicts(module, size, transport="mpi"):
    """What went wrong in each case of a module on ``size`` ranks: one start of MPI for all."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        output, ended = start(size, "-m", "tests.ep.runner", module, report, transport).finish(300)
        assert ended, f"not over after five minutes:\n{output}"
        assert report.exists(), output
        return json.loads(report.read_text())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", cases_core.CASES)
def test_core(size, case):
    wrong = verdicts(cases_core.__name__, size)[case]
    assert not wrong, wrong


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", cases_torch.CASES)
def test_torch(size, case):
    wrong = verdicts(cases_torch.__name__, size)[case]
    assert not wrong, wrong


@pytest.mark.parametrize("case", cases_checkpoint.CASES)
def test_checkpoint(case):
    wrong = verdicts(cases_checkpoint.__name__, 4)[case]
    assert not wrong, wrong


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", cases_core.CASES)
def test_core_over_nccl(size, case):
    import cupy

    devices = cupy.cuda.runtime.getDeviceCount()
    if devices < size:
        pytest.skip(f"{devices} GPUs; NCCL wants one for each of {size} ranks")
    wrong = verdicts(cases_core.__name__, size, "nccl")[case]
    assert not wrong, wrong
