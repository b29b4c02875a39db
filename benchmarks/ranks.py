"""What benchmarks of several ranks have in common: their arguments, their start, and times of the slowest rank."""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from arguments import Shape, positive

WARM_UP = 3
Call = Callable[[], object]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that every benchmark of several ranks has."""
    parser.add_argument(
        "--rounds",
        type=positive,
        default=20,
        metavar="N",
        help="how often each is timed; default: %(default)s",
    )
    parser.add_argument("--cpu", action="store_true", help="float32 over gloo instead of bfloat16 over NCCL")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the record")


def check(parser: argparse.ArgumentParser, cpu: bool, shapes: Iterable[tuple[str, Shape]]) -> None:
    """Ends with the parser's error where the ranks cannot run this; all find it, so that none waits for another."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        parser.error("start it with torchrun, see --help")
    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if not cpu and here > gpus:
        parser.error(
            f"{here} ranks on this machine need a GPU each, and {gpus} can be used: "
            "start no more ranks than GPUs, or use --cpu"
        )
    ranks = int(os.environ["WORLD_SIZE"])
    for name, (*_, E, K) in shapes:
        if E % ranks or E // ranks < K:
            parser.error(
                f"{name}: E={E} is not a multiple of the {ranks} ranks with at least K={K} experts for each"
            )


def start(cpu: bool) -> tuple[torch.device, torch.dtype]:
    """Joins the ranks; the device of this one, and what to measure in."""
    device = torch.device("cpu" if cpu else f"cuda:{os.environ['LOCAL_RANK']}")
    if not cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if cpu else "nccl")
    return device, torch.float32 if cpu else torch.bfloat16


class Timer:
    """Times calls on this rank's device; a time is that of the slowest rank, in milliseconds.

    Each is timed right behind a call of the same that is not, as a layer is in training: torch's allocator then has the
    memory it takes, which others that were called in between may have cut into pieces; and a GPU is still busy with the
    first while the host launches the second. From idle, the GPU begins with nothing to do but wait for the host.
    """

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device = device
        self.rounds = rounds
        self.random = random.Random(0)  # the same order on every rank

    def medians(self, calls: dict[str, Call]) -> dict[str, float]:
        once = self._on_a_gpu if self.device.type == "cuda" else self._on_a_cpu
        times: dict[str, list[float]] = {name: [] for name in calls}
        names = list(calls)
        for number in range(WARM_UP + self.rounds):
            self.random.shuffle(names)
            for name in names:
                took = torch.tensor([once(calls[name])], device=self.device)
                dist.all_reduce(took, dist.ReduceOp.MAX)
                if number >= WARM_UP:
                    times[name].append(took.item())
        return {name: statistics.median(taken) for name, taken in times.items()}

    def _on_a_cpu(self, call: Call) -> float:
        call()
        dist.barrier()
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def _on_a_gpu(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        dist.all_reduce(torch.zeros(1, device=self.device))  # the GPUs begin together; no host waits for it
        start.record()
        call()
        end.record()
        self.wait()
        return start.elapsed_time(end)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def pair(call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Call, Call]:
    """Forward, and forward and backward."""

    def forward() -> object:
        with torch.no_grad():
            return call()

    def both() -> object:
        return torch.autograd.grad(call(), leaves, grad)

    return forward, both
