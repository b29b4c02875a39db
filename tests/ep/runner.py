"""Run on every rank: ``python -m tests.ep.runner MODULE REPORT [nccl]`` calls each case of MODULE in turn.

A case is a function of the communicator that raises where something is wrong on this rank. REPORT gets, as JSON,
what went wrong in each case on any rank, empty where nothing did.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path

from ffmoe_core.comm import Step
from ffmoe_core.comm.mpi import MpiCommunicator, MpiControl

TIMEOUT = 30.0


def communicator(transport="mpi"):
    if transport == "mpi":
        return MpiCommunicator(timeout=TIMEOUT)
    import cupy

    from ffmoe_core.comm.nccl import NcclCommunicator

    control = MpiControl(timeout=TIMEOUT)
    cupy.cuda.Device(control.rank).use()
    return NcclCommunicator(control, timeout=TIMEOUT)


def run(module, report, *transport):
    comm = communicator(*transport)
    verdicts = {}
    for name, case in importlib.import_module(module).CASES.items():
        try:
            case(comm)
            wrong = ""
        except Exception:
            wrong = f"rank {comm.rank}:\n{traceback.format_exc()}"
        try:
            verdicts[name] = "".join(comm.gather(wrong, Step("verdict", name)))
        except Exception:
            verdicts[name] = wrong or traceback.format_exc()
    if comm.rank == 0:
        Path(report).write_text(json.dumps(verdicts))


if __name__ == "__main__":
    run(*sys.argv[1:])
