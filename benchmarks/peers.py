"""One layer, computed by us and by others: the contenders of benchmarks/layer.py.

    ffmoe            ffmoe_torch.fused_moe
    ffmoe_recompute  the same with recompute_activations
    ffmoe_portable   the same with the kernels for every architecture
    bound            two perfectly balanced torch.bmm and an activation: no routing, nothing gathered
    grouped_mm       torch._grouped_mm over sorted rows, compiled by torch.compile, as torchtitan does it
    sonicmoe         SonicMoE (sonic-moe 0.1.2 and its quack-kernels), where it is installed

Each is made by a function of a Problem and is then called without arguments. One that can't run here raises
UnavailableError, with the reason.
"""

import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ffmoe_torch import fused_moe


@dataclass(frozen=True)
class Problem:
    """What every contender is given: the layer's input and weights, as leaves that want a gradient."""

    x: Tensor  # [T, H]
    gate: Tensor  # [E, H]
    w_up: Tensor  # [E, 2I, H], gate rows first
    w_down: Tensor  # [E, H, I]
    grad_output: Tensor  # [T, H]
    top_k: int

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.x, self.gate, self.w_up, self.w_down


@dataclass(frozen=True)
class Contender:
    """A layer ready to be called, and what forward+backward differentiates it by."""

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    grad_output: Tensor

    def gradients(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs, self.grad_output)


class UnavailableError(Exception):
    """A contender cannot run here; the message says why."""


def ffmoe(problem: Problem) -> Contender:
    return Contender(
        lambda: fused_moe(*problem.inputs, problem.top_k)[0], problem.inputs, problem.grad_output
    )


def ffmoe_recompute(problem: Problem) -> Contender:
    return Contender(
        lambda: fused_moe(*problem.inputs, problem.top_k, recompute_activations=True)[0],
        problem.inputs,
        problem.grad_output,
    )


@contextmanager
def portable_kernels() -> Iterator[None]:
    with mock.patch.dict(os.environ, FFMOE_PORTABLE_KERNELS="1"):
        yield


class Portable(Contender):
    def gradients(self) -> tuple[Tensor, ...]:
        with portable_kernels():
            return super().gradients()


def ffmoe_portable(problem: Problem) -> Contender:
    forward = portable_kernels()(ffmoe(problem).forward)
    return Portable(forward, problem.inputs, problem.grad_output)


def bound(problem: Problem) -> Contender:
    num_experts, width, _ = problem.w_down.shape
    num_rows = -(-len(problem.x) * problem.top_k // num_experts)
    rows = torch.randn(
        num_experts, num_rows, width, device=problem.x.device, dtype=problem.x.dtype
    ).requires_grad_()
    glu = torch.compile(lambda g, u: F.silu(g) * u, dynamic=False)

    def forward() -> Tensor:
        g, u = torch.bmm(rows, problem.w_up.transpose(1, 2)).chunk(2, -1)
        return torch.bmm(glu(g, u), problem.w_down.transpose(1, 2))

    return Contender(forward, (rows, problem.w_up, problem.w_down), torch.randn_like(rows))


def grouped_mm(problem: Problem) -> Contender:
    experts = torch.compile(sorted_experts, dynamic=False)

    def forward() -> Tensor:
        logits = F.linear(problem.x, problem.gate)
        return experts(problem.x, *select(logits, problem.top_k), problem.w_up, problem.w_down)

    return Contender(forward, problem.inputs, problem.grad_output)


def reference(problem: Problem) -> Contender:
    """What results are compared with: grouped_mm with a float32 router, as ours is, and not compiled.

    16-bit logits choose other experts for some tokens, which says nothing about the products.
    """

    def forward() -> Tensor:
        logits = F.linear(problem.x.float(), problem.gate.float())
        return sorted_experts(problem.x, *select(logits, problem.top_k), problem.w_up, problem.w_down)

    return Contender(forward, problem.inputs, problem.grad_output)


def select(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values, experts = logits.topk(top_k, dim=-1)
    return values.softmax(-1, dtype=torch.float32), experts


def sorted_experts(x: Tensor, weights: Tensor, experts: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Rows sorted by expert, two grouped products, and a weighted index_add."""
    flat = experts.flatten()
    order = torch.argsort(flat, stable=True)
    offsets = torch.bincount(flat, minlength=len(w_up)).cumsum(0).int()
    tokens = order // experts.shape[1]
    g, u = torch._grouped_mm(x[tokens], w_up.transpose(-2, -1), offs=offsets).chunk(2, -1)
    y = torch._grouped_mm(F.silu(g) * u, w_down.transpose(-2, -1), offs=offsets)
    return torch.zeros_like(x).index_add(0, tokens, y * weights.flatten()[order, None].to(x.dtype))


def sonicmoe(problem: Problem) -> Contender:
    if torch.cuda.get_device_capability() != (9, 0):
        raise UnavailableError("its tiles are picked by hand here, for compute capability 9.0 alone")
    try:
        from sonicmoe.functional import moe_TC_softmax_topk_layer
    except ImportError as error:
        raise UnavailableError(f"sonic-moe is not installed: {error}") from error
    pick_tiles()
    # SonicMoE wants gate and up rows in turn, and the experts last in shape though not in memory
    w_up = problem.w_up.detach().unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).requires_grad_()

    def forward() -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        up, down = w_up.permute(1, 2, 0), problem.w_down.permute(1, 2, 0)
        output: Tensor = moe_TC_softmax_topk_layer(
            problem.x, problem.gate, up, None, down, None, problem.top_k, stream
        )[0]
        return output

    return Contender(forward, (problem.x, problem.gate, w_up, problem.w_down), problem.grad_output)


@functools.cache
def pick_tiles() -> None:
    """Give each of SonicMoE's products one tile in place of its autotuner's search.

    The search compiles for many minutes a shape. The tiles are those that SonicMoE 0.1.0 picked by hand for
    an H100; with one choice left, the autotuner neither searches nor starts its pool of compilers.
    """
    import quack.gemm_interface as interface
    from quack.autotuner import AutotuneConfig
    from quack.gemm_config import GemmConfig

    def tile(columns: int, pingpong: bool) -> GemmConfig:
        return GemmConfig(
            tile_m=128,
            tile_n=columns,
            pingpong=pingpong,
            is_dynamic_persistent=False,
            cluster_m=2,
            cluster_n=1,
            device_capacity=9,
        )

    def picked(a: Tensor, *args: object, **kwargs: object) -> None:
        # a [rows, depth], or [columns, rows] for a weight's gradient, whose contraction is always long
        long = kwargs.get("cu_seqlens_k") is not None or a.shape[1] >= 1024
        product(a, *args, **kwargs | {"config": wide if long else narrow})

    wide, narrow, square = tile(256, False), tile(192, True), tile(128, True)
    interface.gemm_gated_tuned.configs = [AutotuneConfig(config=wide)]
    interface.gemm_dgated_tuned.configs = [AutotuneConfig(config=square)]
    interface.gemm_tuned.configs = [AutotuneConfig(config=wide)]
    product, interface.gemm_tuned.fn = interface.gemm_tuned.fn, picked


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    "ffmoe": ffmoe,
    "ffmoe_recompute": ffmoe_recompute,
    "ffmoe_portable": ffmoe_portable,
    "bound": bound,
    "grouped_mm": grouped_mm,
    "sonicmoe": sonicmoe,
}


def versions() -> dict[str, str]:
    """Versions of what the contenders run on, beside those that every record names."""
    found = {}
    for package in ("triton", "sonic-moe", "quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
