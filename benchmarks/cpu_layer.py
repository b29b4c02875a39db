"""One layer on the CPU, float32, beside its peers, all in one run.

    python benchmarks/cpu_layer.py [--threads N] [--rounds N] [--out FILE] [T,H,I,E,K ...]

Every round times each contender once, in an order drawn anew, so that whatever else the machine does falls
on all alike; the table gives medians over the rounds. Contenders:

    ffmoe         ffmoe_torch.fused_moe
    expert loop   a loop over the experts in torch: select, two products, index_add
    grouped_mm    torch._grouped_mm over sorted rows, as torchtitan does it
    bmm bound     two perfectly balanced torch.bmm and an activation: no routing, nothing gathered

Forward is without autograd; forward+backward asks for the gradients of the input and of every weight. Shapes named
alone are merged into a record of the same sources, processor and settings.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ffmoe_core
import record
from arguments import Shape, chosen_shape, positive, previous
from ffmoe_core.errors import ConfigError
from ffmoe_torch import fused_moe

SHAPES = [*map(chosen_shape, ("2048,512,512,16,2", "4096,256,128,64,8", "64,512,512,16,2"))]
Call = Callable[[], object]


def select(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values, experts = F.linear(x, gate).topk(top_k, dim=-1)
    return values.softmax(-1), experts


def expert_loop(x: Tensor, gate: Tensor, w_up: Tensor, w_down: Tensor, top_k: int) -> Tensor:
    weights, experts = select(x, gate, top_k)
    output = torch.zeros_like(x)
    # unbind, not indexing: the gradient of an indexed weight would be as large as all the experts' weights
    for e, (up, down) in enumerate(zip(w_up.unbind(), w_down.unbind(), strict=True)):
        tokens, slots = torch.where(experts == e)
        g, u = F.linear(x[tokens], up).chunk(2, -1)
        y = F.linear(F.silu(g) * u, down) * weights[tokens, slots, None]
        output = output.index_add(0, tokens, y)
    return output


def grouped_mm(x: Tensor, gate: Tensor, w_up: Tensor, w_down: Tensor, top_k: int) -> Tensor:
    weights, experts = select(x, gate, top_k)
    flat = experts.flatten()
    order = torch.argsort(flat, stable=True)
    offsets = torch.bincount(flat, minlength=len(w_up)).cumsum(0).int()
    tokens = order // top_k
    g, u = torch._grouped_mm(x[tokens], w_up.transpose(-2, -1), offs=offsets).chunk(2, -1)
    y = torch._grouped_mm(F.silu(g) * u, w_down.transpose(-2, -1), offs=offsets)
    return torch.zeros_like(x).index_add(0, tokens, y * weights.flatten()[order].unsqueeze(-1))


def bmm_bound(rows: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    g, u = torch.bmm(rows, w_up.transpose(1, 2)).chunk(2, -1)
    return torch.bmm(F.silu(g) * u, w_down.transpose(1, 2))


def contenders(shape: Shape) -> dict[str, tuple[Call, Call]]:
    """For each contender its forward and its forward+backward."""
    T, H, I, E, K = shape

    def parameter(*size: int, std: float) -> Tensor:
        return (torch.randn(*size) * std).requires_grad_()

    x = parameter(T, H, std=0.5)
    layer = (x, parameter(E, H, std=0.02), parameter(E, 2 * I, H, std=0.02), parameter(E, H, I, std=0.02))
    rows = parameter(E, -(-T * K // E), H, std=0.5)
    functions: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "ffmoe": (lambda *args: fused_moe(*args, K)[0], layer),
        "expert loop": (lambda *args: expert_loop(*args, K), layer),
        "grouped_mm": (lambda *args: grouped_mm(*args, K), layer),
        "bmm bound": (bmm_bound, (rows, *layer[2:])),
    }
    reference = expert_loop(*layer, K)
    calls = {}
    for name, (function, inputs) in functions.items():
        output = function(*inputs)
        if output.shape == reference.shape:
            torch.testing.assert_close(output, reference, rtol=1e-3, atol=1e-5)
        calls[name] = timed_calls(function, inputs, torch.randn_like(output))
    return calls


def timed_calls(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_output: Tensor
) -> tuple[Call, Call]:
    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def forward_backward() -> object:
        return torch.autograd.grad(function(*inputs), inputs, grad_output)

    return forward, forward_backward


def measure(shape: Shape, rounds: int) -> dict[str, dict[str, float]]:
    """Medians in milliseconds, by contender and direction."""
    calls = [
        (name, direction, call)
        for name, pair in contenders(shape).items()
        for direction, call in zip(("forward", "forward_backward"), pair, strict=True)
    ]
    times: dict[tuple[str, str], list[float]] = {(name, direction): [] for name, direction, _ in calls}
    for _, _, call in calls:
        call()
    for _ in range(rounds):
        random.shuffle(calls)
        for name, direction, call in calls:
            start = time.perf_counter()
            call()
            times[name, direction].append((time.perf_counter() - start) * 1e3)
    medians: dict[str, dict[str, float]] = {}
    for (name, direction), values in times.items():
        medians.setdefault(name, {})[direction] = round(statistics.median(values), 3)
    return medians


def summary(medians: dict[str, dict[str, float]], direction: str) -> dict[str, float]:
    """ffmoe's time as a ratio to the faster peer's, and to the bound's."""
    mine = medians["ffmoe"][direction]
    peer = min(medians["expert loop"][direction], medians["grouped_mm"][direction])
    return {"to_peer": round(mine / peer, 3), "to_bound": round(mine / medians["bmm bound"][direction], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "shapes", nargs="*", type=chosen_shape, metavar="T,H,I,E,K", help="default: the three of the design"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=ffmoe_core.get_num_threads(),
        metavar="N",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=40,
        metavar="N",
        help="how often each is timed; default: %(default)s",
    )
    parser.add_argument(
        "--out", type=Path, default=record.RESULTS / "cpu_layer.json", help="the record; default: %(default)s"
    )
    arguments = parser.parse_args()
    try:
        ffmoe_core.set_num_threads(arguments.threads)
    except ConfigError as error:
        parser.error(f"argument --threads: {error}")
    torch.set_num_threads(arguments.threads)
    random.seed(0)
    torch.manual_seed(0)

    settings = {"threads": arguments.threads, "rounds": arguments.rounds, "dtype": "float32"}
    head = {**record.environment(), "sources": record.sources_digest(), **settings}
    results = previous(arguments.out, head) if arguments.shapes else {}
    for name, sizes in arguments.shapes or SHAPES:
        medians = measure(sizes, arguments.rounds)
        ratios = {direction: summary(medians, direction) for direction in ("forward", "forward_backward")}
        results[name] = {"median_ms": medians, "ratios": ratios}
        print(f"{name}: milliseconds, forward / forward+backward")
        for contender, row in medians.items():
            print(f"    {contender:12} {row['forward']:9.2f} / {row['forward_backward']:9.2f}")
        for direction, row in ratios.items():
            print(f"    {direction}: {row['to_peer']:.2f}x the faster peer, {row['to_bound']:.2f}x the bound")
        sys.stdout.flush()
    record.write(arguments.out, {**head, "shapes": results})


if __name__ == "__main__":
    main()
