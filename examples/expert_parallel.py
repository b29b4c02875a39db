"""A mixture of experts whose experts are spread over ranks, trained on what each rank alone has seen.

The task is that of cupy_moe.py. Every rank draws examples of its own, sends each to the ranks of its experts, and
ends with the same router.

    mpirun -n 2 python examples/expert_parallel.py          # the core, on GPUs over NCCL
    mpirun -n 2 python examples/expert_parallel.py --cpu    # the core, on NumPy arrays over MPI
    torchrun --nproc-per-node 2 examples/expert_parallel.py [--cpu]    # MoELayer, DDP around it
"""

import argparse
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np

from cupy_moe import (
    EXPERTS,
    GOAL,
    HIDDEN,
    LEARNING_RATE,
    STEPS,
    TOKENS,
    TOP_K,
    WIDTH,
    Adam,
    Teacher,
    new_parameters,
)
from ffmoe_core import ExpertParallel, MoEConfig
from ffmoe_core.comm import Communicator, Step, all_reduced
from ffmoe_core.errors import DeviceError, FFMoEError, MissingDependencyError

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
if UNDER_TORCHRUN:  # the core needs no torch
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from ffmoe_torch import MoELayer, ddp_ignored

AUX_LOSS = 0.01
TIMEOUT = 60.0  # seconds that a rank waits for another


def check_gpus(ranks: int, gpus: int) -> None:
    """Every rank of this machine finds out, so that none waits for another."""
    if ranks > gpus:
        raise DeviceError(
            f"{ranks} ranks on this machine need a GPU each, and {gpus} can be used: "
            "start no more ranks than GPUs, or use --cpu"
        )


def report(rank: int, step: int, loss: float) -> None:
    if rank == 0 and (step == 1 or step % (STEPS // 10) == 0):
        print(f"step {step:4}  squared error {loss:.4f}", flush=True)


# --- the core, under mpirun ---


def communicator(cpu: bool) -> Communicator:
    if cpu:
        from ffmoe_core.comm.mpi import MpiCommunicator

        return MpiCommunicator(timeout=TIMEOUT)
    try:
        import cupy
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "CuPy is not installed: pip install 'ffmoe[cuda13]' (or cuda12), or use --cpu"
        ) from None
    from ffmoe_core.comm.mpi import MPI, MpiControl
    from ffmoe_core.comm.nccl import NcclCommunicator

    on_this_host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    check_gpus(on_this_host.Get_size(), cupy.cuda.runtime.getDeviceCount() if cupy.cuda.is_available() else 0)
    cupy.cuda.Device(on_this_host.Get_rank()).use()
    return NcclCommunicator(MpiControl(timeout=TIMEOUT), timeout=TIMEOUT)


def train_core(xp: ModuleType, comm: Communicator) -> float:
    """Train; returns the share of fresh examples' variance left unexplained, over all ranks."""
    same, own = xp.random.default_rng(0), xp.random.default_rng([1, comm.rank])
    config = MoEConfig(
        d_model=WIDTH, ffn_dim=2 * HIDDEN, num_experts=EXPERTS, top_k=TOP_K, aux_loss_coeff=AUX_LOSS
    )
    layer = ExpertParallel(comm, config, layer="moe")
    teacher = Teacher(xp, same)
    parameters = new_parameters(same)
    for name in ("w_up", "w_down"):  # this rank's experts
        parameters[name] = parameters[name][layer.experts.start : layer.experts.stop].copy()
    optimizer = Adam(xp, parameters)
    # the losses are the same on every rank, and each counts them: together, once
    grad_losses = xp.asarray([1 / comm.size, 0, 0], dtype="float32")
    for step in range(1, STEPS + 1):
        x, y = teacher.examples(own, TOKENS // comm.size)
        result = layer.forward(x, **parameters)
        error = result.output - y
        grad = 2 / (error.size * comm.size) * error  # of the mean over all ranks' examples
        grads = layer.backward(grad, result, x, **parameters, grad_losses=grad_losses)
        gradients = {
            "gate_weight": all_reduced(comm, grads.gate_weight, Step("gradients")),
            "w_up": grads.w_up,
            "w_down": grads.w_down,
        }
        optimizer.step(gradients, LEARNING_RATE * (1 - step / STEPS))
        report(comm.rank, step, float((error**2).mean()))
    x, y = teacher.examples(own, 4 * TOKENS)
    output = layer.forward(x, **parameters, save_for_backward=False).output
    squares = xp.stack([((output - y) ** 2).sum(), ((y - y.mean()) ** 2).sum()])
    left, variance = all_reduced(comm, squares, Step("evaluation"))
    return float(left / variance)


# --- MoELayer, under torchrun ---


def train_torch(cpu: bool) -> float:
    """The same with torch, in a process group."""
    device = torch.device("cpu" if cpu else f"cuda:{os.environ['LOCAL_RANK']}")
    if not cpu:
        check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if cpu else "nccl")
    unexplained = train_layer(device)
    # DDP went with train_layer. Where it outlives its group, torch can deadlock: DDP then ends gloo's threads while
    # it holds the interpreter's lock, and one of them may want that lock to let go of a tensor.
    dist.destroy_process_group()
    return unexplained


def train_layer(device: "torch.device") -> float:
    """DDP averages the router's gradients, the experts' come scaled to match."""
    rank, size = dist.get_rank(), dist.get_world_size()
    same, own = np.random.default_rng(0), np.random.default_rng([1, rank])
    teacher = Teacher(np, same)
    layer = MoELayer(WIDTH, 2 * HIDDEN, EXPERTS, TOP_K, aux_loss_coeff=AUX_LOSS).to(device)
    layer.shard_experts(ep_timeout=TIMEOUT)  # before DDP and the optimizer
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(layer, ddp_ignored(layer))
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)

    def examples(count: int) -> list[Any]:
        return [torch.from_numpy(part).to(device) for part in teacher.examples(own, count)]

    for step in range(1, STEPS + 1):
        x, y = examples(TOKENS // size)
        output, losses = model(x)
        error = (output - y).square().mean()
        optimizer.zero_grad()
        (error + losses["aux_loss"]).backward()
        optimizer.step()
        schedule.step()
        report(rank, step, error.item())
    with torch.no_grad():
        x, y = examples(4 * TOKENS)
        squares = torch.stack([(model(x)[0] - y).square().sum(), (y - y.mean()).square().sum()])
    dist.all_reduce(squares)
    return (squares[0] / squares[1]).item()


def trained(cpu: bool) -> tuple[int, float]:
    """This rank's number, and what train_core or train_torch returned."""
    if UNDER_TORCHRUN:
        return int(os.environ["RANK"]), train_torch(cpu)
    comm = communicator(cpu)
    if cpu:
        xp: ModuleType = np
    else:
        import cupy as xp
    return comm.rank, train_core(xp, comm)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="host memory instead of GPUs")
    cpu = parser.parse_args().cpu
    try:
        rank, unexplained = trained(cpu)
    except (FFMoEError, ImportError) as error:
        print(f"expert_parallel.py: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        print(f"unexplained variance on fresh examples: {unexplained:.1%} (the goal is {GOAL:.0%})")
    return 0 if unexplained < GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
