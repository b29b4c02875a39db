"""What each overlap of a layer with its experts spread over ranks hides, and a timeline of it.

    torchrun --nproc-per-node 2 benchmarks/ep_overlap.py [--rounds N] [--chunks N,...] [--out FILE] [T,H,I,E,K]
    torchrun --nproc-per-node 2 benchmarks/ep_overlap.py --cpu 1024,512,256,8,2    # gloo, to try it out

The shape is that of a rank: T tokens each. bfloat16 on GPUs, float32 on CPUs; one shared expert, and both losses.
Contenders:

    all on             the layer as it is
    X off              the same without one overlap:
      shared expert      runs after all else (on CPUs it always does)
      weight gradients   start when dx has arrived, and so do the router's, which come after them
      router gradients   start when dx has arrived; the experts' weight gradients do not wait
      losses             their sums have arrived before anything else is started
      packing            starts when the counts have arrived
    all off
    N chunks           all on, with ep_chunks=N

The layer has no switch for them: its communicator is wrapped in one that waits sooner. Every round times each
contender once, in an order drawn anew and the same on every rank; a time is that of the slowest rank, and the table
gives medians over the rounds.

With --out the record has timelines of rank 0's forward and backward too: all on, all off, and with chunks. They are of
kernels, by torch.profiler, on GPUs; of the host's work, and of exchanges from their start to their arrival, on CPUs.
They are drawn beside it (benchmarks/timeline.py).
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

import ffmoe_torch.layer
import ranks
import record
import timeline
from arguments import Shape, chosen_shape, positive
from ffmoe_core.arrays import Array, DeviceType, Space, as_array
from ffmoe_core.backend import STAGES, backend_for
from ffmoe_core.comm import Communicator, Step
from ffmoe_core.comm.base import DEFAULT_TIMEOUT
from ffmoe_core.comm.communicator import Parts, Transfer
from ffmoe_torch import MoELayer, dense_glu
from ffmoe_torch.communicator import communicator_for
from ffmoe_torch.dense_glu import Spared
from ffmoe_torch.shared_expert import BesideExchanges, SharedExpert
from timeline import EXCHANGES, LAYER, MARK, Span

SHAPE = "8192,4096,1024,128,8"
SHARED, ROUTER = "shared expert", "router gradients"
# the exchanges that are waited for at once where an overlap is off
AT_ONCE = {"weight gradients": "dispatch backward", "losses": "losses", "packing": "counts"}
OVERLAPS = (SHARED, "weight gradients", ROUTER, "losses", "packing")
# who waits for the first waits for the second as well where the router's overlap is off
ROUTER_NEEDS, ROUTER_WAITS = "weights backward", "dispatch backward"

KIND_OF = {
    "gate_logits": "router",
    "route": "router",
    "route_and_sort": "router",
    "router_losses": "router",
    "route_backward": "router",
    "gate_backward": "router",
    "combine": "sums",
    "grouped_gemm": "grouped products",
    "grouped_gemm_wgrad": "grouped products",
    "grouped_glu": "grouped products",
    "grouped_glu_backward": "grouped products",
}  # every other stage is "rest"
SHARED_PARTS = ("glu_up", "glu_down", "glu_down_backward", "glu_up_backward")
LABELS = {"grouped_gemm_wgrad": "weight gradient"}


class Started:
    """A Transfer that may be waited for twice, and waits for ``others`` as well."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer: Transfer | None = transfer
        self.others: Callable[[], Iterable[Started]] = tuple

    def wait(self) -> None:
        transfer, self.transfer = self.transfer, None
        if transfer is not None:
            transfer.wait()
        for other in self.others():
            other.wait()


class Marks:
    """What is told of the work that starts: nothing."""

    telling = False  # of something right now, whose parts are not told of

    def stage(self, kind: str, name: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def exchange(self, name: str, start: Callable[[], Transfer]) -> Transfer:
        with self.stage("exchange", name):
            return start()


class ProfilerMarks(Marks):
    """Names in the profiler's trace."""

    def stage(self, kind: str, name: str) -> contextlib.AbstractContextManager[Any]:
        return torch.profiler.record_function(f"{MARK}{kind}|{name}")


class HostMarks(Marks):
    """Spans by the host's clock: of stages, and of exchanges until they have arrived."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.stages: list[Span] = []
        self.exchanges: list[tuple[str, float, list[float]]] = []

    def now(self) -> float:
        return 1e6 * (time.perf_counter() - self.began)

    @contextlib.contextmanager
    def stage(self, kind: str, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.stages.append(Span(LAYER, kind, name, start, self.now()))

    def exchange(self, name: str, start: Callable[[], Transfer]) -> Transfer:
        arrivals: list[float] = []
        self.exchanges.append((name, self.now(), arrivals))
        transfer = start()
        for work in transfer._works:  # type: ignore[attr-defined]
            work.get_future().then(lambda _: arrivals.append(self.now()))
        return transfer

    def spans(self) -> list[Span]:
        crossed = [
            Span(EXCHANGES, "exchange", name, start, max(arrivals, default=start))
            for name, start, arrivals in self.exchanges
        ]
        return crossed + self.stages


class Switched:
    """A Communicator whose exchanges can be waited for sooner than the layer would, and that tells of them."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.off: frozenset[str] = frozenset()  # of OVERLAPS
        self.marks = Marks()
        self.last: dict[str, Started] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def all_to_all(self, space: Space, send: Array, recv: Array, step: Step) -> Started:
        return self._start(step, lambda: self.comm.all_to_all(space, send, recv, step))

    def all_to_all_v(
        self, space: Space, parts: Parts, to_ranks: Sequence[int], from_ranks: Sequence[int], step: Step
    ) -> Started:
        return self._start(step, lambda: self.comm.all_to_all_v(space, parts, to_ranks, from_ranks, step))

    def all_reduce(self, space: Space, parts: Parts, step: Step) -> Started:
        return self._start(step, lambda: self.comm.all_reduce(space, parts, step))

    def read(self, space: Space, array: Array, step: Step) -> Callable[[], np.ndarray]:
        with self.marks.stage("rest", f"{step.name} to the host"):
            return self.comm.read(space, array, step)

    def _start(self, step: Step, start: Callable[[], Transfer]) -> Started:
        started = self.last[step.name] = Started(self.marks.exchange(step.name, start))
        if step.name in {AT_ONCE.get(name) for name in self.off}:
            started.wait()
        if step.name == ROUTER_NEEDS and ROUTER in self.off:
            started.others = lambda: [self.last[ROUTER_WAITS]]
        return started


class NotBeside(BesideExchanges):
    """In the place of the layer's: computed where it is needed, and nothing is under way."""

    def start(self, spared: Spared) -> None:
        pass


@contextlib.contextmanager
def without(comm: Switched, off: Iterable[str]) -> Iterator[None]:
    """The layer without these overlaps."""
    comm.off = frozenset(off)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, comm, "off", frozenset())
        if SHARED in comm.off:
            stack.enter_context(mock.patch.object(ffmoe_torch.layer, "BesideExchanges", NotBeside))
        yield


class Contenders:
    """Forward, and forward and backward, of the layer with and without its overlaps."""

    def __init__(
        self,
        comm: Communicator,
        shape: Shape,
        chunks: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        T, H, I, E, K = shape
        self.comm = Switched(comm)
        torch.manual_seed(1 + comm.rank)
        x = torch.randn(T, H, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn(T, H, device=device, dtype=dtype)
        self.space = as_array(x)[1]
        self.shared: list[SharedExpert] = []

        def calls(**options: int) -> tuple[ranks.Call, ranks.Call]:
            torch.manual_seed(0)
            layer = MoELayer(
                H, 2 * I, E, K, num_shared_experts=1, aux_loss_coeff=0.01, z_loss_coeff=0.001,
                aux_mode="inject", device=device, dtype=dtype,
            )  # fmt: skip
            torch.nn.init.normal_(layer.gate.weight, std=H**-0.5)  # a router without favourites
            layer.shard_experts(self.comm, **options)
            self.shared.append(layer.shared_expert)
            return ranks.pair(lambda: layer(x)[0], [x, *layer.parameters()], grad)

        base = calls()
        off = {"all on": (), **{f"{name} off": (name,) for name in OVERLAPS}, "all off": OVERLAPS}
        self.calls: dict[str, tuple[ranks.Call, ranks.Call]] = {
            name: (partial(self.call, base[0], names), partial(self.call, base[1], names))
            for name, names in off.items()
        }
        for number in chunks:
            self.calls[f"{number} chunks"] = calls(ep_chunks=number)

    def call(self, call: ranks.Call, off: Iterable[str]) -> object:
        with without(self.comm, off):
            return call()

    @contextlib.contextmanager
    def marked(self, marks: Marks) -> Iterator[None]:
        """Every exchange and stage, and the shared expert, tell ``marks`` of themselves."""
        backend = backend_for(self.space)
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self.comm, "marks", self.comm.marks)
            self.comm.marks = marks
            for name in STAGES:
                told = staticmethod(telling(marks, KIND_OF.get(name, "rest"), name, getattr(backend, name)))
                stack.enter_context(mock.patch.object(backend, name, told))
            # On GPUs it is the runtime's, in parts, but for a module with hooks; on CPUs torch's operations.
            for name in SHARED_PARTS:
                part = telling(marks, "shared expert", "shared expert", getattr(dense_glu, name))
                stack.enter_context(mock.patch.object(dense_glu, name, part))
            if self.space.device_type == DeviceType.CPU:
                for expert in self.shared:
                    for hook in hooks(marks, expert):
                        stack.callback(hook.remove)
            yield


def telling(marks: Marks, kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def told(*arguments: Any, **options: Any) -> Any:
        if marks.telling:
            return function(*arguments, **options)
        marks.telling = True
        try:
            with marks.stage(kind, LABELS.get(name, name).replace("_", " ")):
                return function(*arguments, **options)
        finally:
            marks.telling = False

    return told


def hooks(marks: Marks, expert: SharedExpert) -> list[Any]:
    """The shared expert's forward and backward tell ``marks`` of themselves."""
    inside: list[contextlib.AbstractContextManager[Any]] = []

    def enter(*_: object) -> None:
        inside.append(marks.stage("shared expert", "shared expert"))
        inside[-1].__enter__()

    def leave(*_: object) -> None:
        inside.pop().__exit__(None, None, None)

    return [
        expert.register_forward_pre_hook(enter),
        expert.register_forward_hook(leave),
        expert.register_full_backward_pre_hook(enter),
        expert.register_full_backward_hook(leave),
    ]


def recorded(contenders: Contenders, call: ranks.Call, timer: ranks.Timer) -> list[Span]:
    """A call's timeline on this rank. The second of two: the first is slow to start."""
    for _ in range(2):
        dist.barrier()
        timer.wait()
        spans = on_device(contenders, call) if timer.device.type == "cuda" else on_host(contenders, call)
    return spans


def on_host(contenders: Contenders, call: ranks.Call) -> list[Span]:
    marks = HostMarks()
    with contenders.marked(marks):
        call()
    dist.barrier()  # what tells of the last arrival has run
    return marks.spans()


def on_device(contenders: Contenders, call: ranks.Call) -> list[Span]:
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        with contenders.marked(ProfilerMarks()):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        return timeline.from_trace(json.loads(path.read_text())["traceEvents"])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shape",
        nargs="?",
        type=chosen_shape,
        default=SHAPE,
        metavar="T,H,I,E,K",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--chunks",
        type=lambda text: [positive(number) for number in text.split(",")],
        default=[],
        metavar="N,...",
        help="contenders with ep_chunks=N",
    )
    ranks.add_options(parser)
    args = parser.parse_args()
    ranks.check(parser, args.cpu, [args.shape])
    return args


def main() -> None:
    args = parsed()
    device, dtype = ranks.start(args.cpu)
    timer = ranks.Timer(device, args.rounds)
    name, sizes = args.shape
    comm = communicator_for(None, "auto", DEFAULT_TIMEOUT, device)
    contenders = Contenders(comm, sizes, args.chunks, device, dtype)
    calls = contenders.calls
    forward = timer.medians({name: call for name, (call, _) in calls.items()})
    both = timer.medians({name: call for name, (_, call) in calls.items()})
    if dist.get_rank() == 0:
        print(f"{name}: milliseconds forward / forward+backward")
        for contender in calls:
            print(f"  {contender:22} {forward[contender]:9.3f} {both[contender]:9.3f}", flush=True)
    if args.out:
        drawn = ["all on", "all off", *(f"{number} chunks" for number in args.chunks)]
        timelines = {title: recorded(contenders, calls[title][1], timer) for title in drawn}
        if dist.get_rank() == 0:
            write(args, {"forward": forward, "forward_backward": both}, timelines)
    dist.destroy_process_group()


def write(args: argparse.Namespace, times: dict[str, Any], timelines: dict[str, list[Span]]) -> None:
    environment = record.environment()
    size = dist.get_world_size()
    name, sizes = args.shape
    if args.cpu:
        where = f"{size} CPU processes on {environment['cores']} cores, gloo, float32"
    else:
        where = f"{size} ranks on {environment.get('device', 'GPUs')}, NCCL, bfloat16"
    result = {
        **environment,
        "sources": record.sources_digest(),
        "title": f"Forward and backward of a rank with T,H,I,E,K = {name}; {where}",
        "ranks": size,
        "shape": sizes,
        "rounds": args.rounds,
        **times,
        "timelines": {
            title: [(*span[:3], round(span.start, 1), round(span.end, 1)) for span in spans]
            for title, spans in timelines.items()
        },
    }
    record.write(args.out, result)
    try:
        timeline.draw(result | {"timelines": timelines}, args.out.with_suffix(".svg"))
    except SystemExit as error:  # the record is there: a plot can be drawn later, and elsewhere
        print(error)


if __name__ == "__main__":
    main()
