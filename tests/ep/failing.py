"""Run on every rank: ``python -m tests.ep.failing FOLDER HOW WHERE VICTIM TIMEOUT [RANK SIZE]``.

With RANK and SIZE the ranks meet over gloo, else over MPI; in a store that is a file, or in rank 0 where FFMOE_STORE is
its address.

One rank is killed, stopped or raises at one place of the third step; every other rank writes to FOLDER what its
step raised, and after how many seconds.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from ffmoe_core.errors import CommError
from ffmoe_core.expert_parallel import ExpertParallel, aborting
from tests.ep.cases_core import BASE, uneven
from tests.ep.single import group_layer

STEPS = 5
BAD_STEP = 2


def fail(how):
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise RuntimeError("out of luck")


def failing(ep, how):
    """In the place of a method of ``ep``."""

    def method(*args, **kwargs):
        with aborting(ep.comm):  # as the layer does around each of its methods
            fail(how)

    return method


def communicator(folder, timeout, rank=None, size=None):
    if rank is None:
        from ffmoe_core.comm.mpi import MpiCommunicator

        return MpiCommunicator(timeout=timeout)
    import torch.distributed as dist

    from ffmoe_torch.communicator import TorchCommunicator

    init = os.environ.get("FFMOE_STORE", f"file://{folder}/store")
    dist.init_process_group("gloo", init_method=init, rank=int(rank), world_size=int(size))
    return TorchCommunicator(dist.group.WORLD, timeout)


def main(folder, how, where, victim, timeout, *place):
    comm = communicator(folder, float(timeout), *place)
    layer = group_layer(BASE, uneven(comm.size), "float32")
    ep = ExpertParallel(comm, BASE, layer="blocks.3.moe")
    cut, own = layer.cuts[comm.rank], slice(ep.experts.start, ep.experts.stop)
    arguments = (layer.x[cut], layer.gate_weight, layer.w_up[own], layer.w_down[own])
    Path(folder, f"{comm.rank}.pid").write_text(str(os.getpid()))
    for step in range(STEPS):
        if comm.rank == int(victim) and step == BAD_STEP:
            if where == "between":
                fail(how)
            method = {"forward": "run_experts", "backward": "run_experts_backward"}[where]
            setattr(ep, method, failing(ep, how))
        start = time.monotonic()
        try:
            result = ep.forward(*arguments)
            ep.backward(layer.grad_output[cut], result, *arguments, grad_losses=layer.grad_losses)
        except CommError as error:
            report = {"message": str(error), "ranks": error.ranks, "step": error.step, "layer": error.layer}
            report["seconds"] = time.monotonic() - start
            part = Path(folder, f"{comm.rank}.part")
            part.write_text(json.dumps(report))
            part.rename(Path(folder, f"{comm.rank}.json"))
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
