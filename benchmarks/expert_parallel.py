"""A layer with its experts spread over ranks beside its peer, and the bytes on the wire, all in one run.

    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py [--rounds N] [--out FILE] [T,H,I,E,K ...]
    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py --cpu 256,64,64,8,2    # gloo, to try it out

Shapes are those of a rank: T tokens each. bfloat16 on GPUs, float32 on CPUs. Contenders:

    ffmoe         MoELayer with shard_experts
    2 chunks      the same with ep_chunks=2, and 4 chunks with 4
    + shared      the same with one shared expert
    shared alone  that shared expert by itself
    peer          all_to_all_single of every (token, expert) row, torch._grouped_mm over sorted rows, and back
    alone         MoELayer on one device with E / ranks experts: as many rows a device, nothing sent

Every round times each contender once, in an order drawn anew and the same on every rank; a time is that of the
slowest rank, and the tables give medians over the rounds. The wire: bytes to other ranks a second, of our
all-to-all and of all_to_all_single, by MiB a rank.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import ranks
import record
from arguments import Shape, chosen_shape
from ffmoe_core.arrays import as_array
from ffmoe_core.comm import Step
from ffmoe_torch import MoELayer
from ranks import Call, Timer, pair

SHAPES = [*map(chosen_shape, ("8192,4096,1024,128,8", "8192,7168,2048,64,8", "8192,1024,2048,8,2"))]
WIRE_MIB = (8, 64, 256, 512)


class AllToAll(torch.autograd.Function):
    """Rows to the ranks they are for; backward sends the gradients home."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sizes = sent, received
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        sent, received = ctx.sizes
        return AllToAll.apply(grads[0], received, sent), None, None


def peer(x: Tensor, gate: Tensor, w_up: Tensor, w_down: Tensor, top_k: int) -> Tensor:
    """Expert parallelism as it is commonly written in torch."""
    size, here = dist.get_world_size(), len(w_up)
    values, experts = F.linear(x, gate).topk(top_k, dim=-1)
    flat = experts.flatten()
    order = torch.argsort(flat, stable=True)
    tokens, weights = order // top_k, values.softmax(-1).flatten()[order]
    counts = torch.bincount(flat, minlength=len(gate))
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts)
    sizes = torch.stack([counts.view(size, here).sum(1), arriving.view(size, here).sum(1)]).tolist()
    rows = AllToAll.apply(x[tokens], *sizes)
    local = torch.arange(here, device=x.device).repeat(size).repeat_interleave(arriving)
    by_expert = torch.argsort(local, stable=True)
    offsets = arriving.view(size, here).sum(0).cumsum(0).int()
    g, u = torch._grouped_mm(rows[by_expert], w_up.transpose(-2, -1), offs=offsets).chunk(2, -1)
    y = torch._grouped_mm(F.silu(g) * u, w_down.transpose(-2, -1), offs=offsets)
    home = AllToAll.apply(torch.empty_like(y).index_copy(0, by_expert, y), *reversed(sizes))
    return torch.zeros_like(x).index_add(0, tokens, home * weights[:, None].to(home.dtype))


def contenders(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Call, Call]]:
    """name -> (forward, forward and backward)."""
    T, H, I, E, K = shape
    torch.manual_seed(0)
    layers = {
        "ffmoe": MoELayer(H, 2 * I, E, K, device=device, dtype=dtype),
        "2 chunks": MoELayer(H, 2 * I, E, K, device=device, dtype=dtype),
        "4 chunks": MoELayer(H, 2 * I, E, K, device=device, dtype=dtype),
        "+ shared": MoELayer(H, 2 * I, E, K, num_shared_experts=1, device=device, dtype=dtype),
        "alone": MoELayer(H, 2 * I, E // dist.get_world_size(), K, device=device, dtype=dtype),
    }
    for name, chunks in (("ffmoe", 1), ("2 chunks", 2), ("4 chunks", 4), ("+ shared", 1)):
        layers[name].shard_experts(ep_chunks=chunks)
    for layer in layers.values():
        torch.nn.init.normal_(layer.gate.weight, std=H**-0.5)  # a router without favourites
    torch.manual_seed(1 + dist.get_rank())
    x = torch.randn(T, H, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(T, H, device=device, dtype=dtype)
    shared = layers["+ shared"].shared_expert
    ours = layers["ffmoe"]
    weights = [part.detach().clone().requires_grad_() for part in (ours.gate.weight, *ours.expert_params)]
    calls: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        name: (lambda layer=layer: layer(x)[0], [x, *layer.parameters()]) for name, layer in layers.items()
    }
    calls["shared alone"] = (lambda: shared(x), [x, *shared.parameters()])
    calls["peer"] = (lambda: peer(x, *weights, K), [x, *weights])
    return {name: pair(call, leaves, grad) for name, (call, leaves) in calls.items()}


def wire(mib: int, device: torch.device, timer: Timer) -> dict[str, float]:
    """GB/s that a rank sends to others, ``mib`` MiB in all."""
    size = dist.get_world_size()
    layer = MoELayer(8, 8, size, 1, device=device)
    layer.shard_experts()
    comm = layer._sharded.comm
    rows = (mib << 20) // 4096 // size * size
    sent, received = (torch.zeros(rows, 4096, dtype=torch.uint8, device=device) for _ in range(2))
    counts = [rows // size] * size
    (send, space), (recv, _) = as_array(sent), as_array(received)
    step = Step("wire")
    times = timer.medians(
        {
            "ffmoe": lambda: comm.all_to_all_v(space, [(send, recv)], counts, counts, step).wait(),
            "all_to_all_single": lambda: dist.all_to_all_single(received, sent),
        }
    )
    leaving = sent.nbytes * (size - 1) / size
    return {name: leaving / took / 1e6 for name, took in times.items()}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shapes",
        nargs="*",
        type=chosen_shape,
        default=SHAPES,
        metavar="T,H,I,E,K",
        help=f"default: {' '.join(name for name, _ in SHAPES)}",
    )
    ranks.add_options(parser)
    args = parser.parse_args()
    ranks.check(parser, args.cpu, args.shapes)
    return args


def main() -> None:
    args = parsed()
    device, dtype = ranks.start(args.cpu)
    timer = Timer(device, args.rounds)
    results: dict[str, Any] = {"ranks": dist.get_world_size(), "layers": [], "wire": []}
    for _, sizes in args.shapes:
        calls = contenders(sizes, device, dtype)
        forward = timer.medians({name: call for name, (call, _) in calls.items()})
        both = timer.medians({name: call for name, (_, call) in calls.items()})
        results["layers"].append({"shape": sizes, "forward": forward, "forward_backward": both})
        ours, theirs = (calls[name][0]() for name in ("ffmoe", "peer"))
        difference = (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(ours)).item()
        results["layers"][-1]["difference"] = difference
        if dist.get_rank() == 0:
            print(f"\n{sizes}: milliseconds forward / forward+backward; outputs differ by {difference:.1e}")
            for name in calls:
                print(f"  {name:14} {forward[name]:9.3f} {both[name]:9.3f}", flush=True)
    for mib in (1,) if args.cpu else WIRE_MIB:
        rates = wire(mib, device, timer)
        results["wire"].append({"mib": mib, **rates})
        if dist.get_rank() == 0:
            print(f"wire, {mib} MiB: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()))
    if args.out and dist.get_rank() == 0:
        record.write(args.out, {**record.environment(), "sources": record.sources_digest(), **results})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
