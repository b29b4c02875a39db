"""Host time of a small layer on a GPU: what one call costs the Python thread, and where it goes.

    python benchmarks/host_time.py [--out FILE]

Host time is the wall time of the call alone: the GPU works on behind it and is waited for only between
batches, which are short enough that its queue never fills. The layer is small (T=64, H=512, I=256, E=8,
K=2, bfloat16), so that host time is what a user of it would wait for. Medians over all calls. One nn.Linear
is timed in the same run: host time depends on the machine's processor, and this is its yardstick.
"""

import argparse
import cProfile
import multiprocessing
import os
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

import ffmoe_core
from ffmoe_torch import MoELayer, fused_moe
from record import RESULTS, ROOT, environment, sources_digest, write

TOKENS, D_MODEL, INTERMEDIATE, EXPERTS, TOP_K = 64, 512, 256, 8, 2
WARM_UP, BATCHES, CALLS = 20, 50, 20
BARS_US = {"forward": 80.0, "forward_backward": 300.0}
TOP = 20


def host_time_us(call: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Median host time of ``call`` in microseconds; ``before`` runs ahead of each call, untimed."""
    times = []
    for batch in range(-1, BATCHES):
        torch.cuda.synchronize()
        for _ in range(WARM_UP if batch < 0 else CALLS):
            if before:
                before()
            start = time.perf_counter_ns()
            call()
            if batch >= 0:
                times.append(time.perf_counter_ns() - start)
    torch.cuda.synchronize()
    return round(statistics.median(times) / 1e3, 1)


class SmallLayer:
    """The layer of the bar, and one call of it at each level between the caller and the kernels."""

    def __init__(self, device: str = "cuda") -> None:
        torch.manual_seed(0)
        options = {"device": device, "dtype": torch.bfloat16}
        self.layer = MoELayer(D_MODEL, 2 * INTERMEDIATE, EXPERTS, TOP_K, **options)
        self.x = torch.randn(TOKENS, D_MODEL, **options, requires_grad=True)
        self.grad = torch.randn(TOKENS, D_MODEL, **options)
        self.arrays = (self.x.detach(), self.layer.gate.weight.detach())
        self.arrays += (self.layer.w_up.detach(), self.layer.w_down.detach())
        self.linear = torch.nn.Linear(D_MODEL, D_MODEL, **options)
        self.config = ffmoe_core.MoEConfig(
            d_model=D_MODEL, ffn_dim=2 * INTERMEDIATE, num_experts=EXPERTS, top_k=TOP_K
        )

    def clear_gradients(self) -> None:
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)
        self.linear.zero_grad(set_to_none=True)

    def core_forward(self) -> ffmoe_core.MoEResult:
        return ffmoe_core.moe_forward(*self.arrays, self.config)

    def core_backward(self, saved: ffmoe_core.MoESaved | None) -> ffmoe_core.MoEGrads:
        return ffmoe_core.moe_backward(self.grad, saved, *self.arrays, self.config)

    @torch.no_grad()
    def op_forward(self) -> object:
        return fused_moe(self.x, self.layer.gate.weight, self.layer.w_up, self.layer.w_down, TOP_K)

    @torch.no_grad()
    def forward(self) -> object:
        return self.layer(self.x)

    def forward_with_graph(self) -> object:
        return self.layer(self.x)

    def forward_backward(self) -> None:
        output, _ = self.layer(self.x)
        output.backward(self.grad)

    @torch.no_grad()
    def linear_forward(self) -> object:
        return self.linear(self.x)

    def linear_forward_backward(self) -> None:
        self.linear(self.x).backward(self.grad)


def levels(small: SmallLayer) -> dict[str, float]:
    """Median microseconds of a call entered at each level, from the kernels outwards."""
    saved = small.core_forward().saved
    return {
        "core forward": host_time_us(small.core_forward),
        "fused_moe forward": host_time_us(small.op_forward),
        "layer forward": host_time_us(small.forward),
        "layer forward, recording the graph": host_time_us(small.forward_with_graph),
        "core backward": host_time_us(lambda: small.core_backward(saved)),
        "layer forward+backward": host_time_us(small.forward_backward, small.clear_gradients),
        "nn.Linear forward": host_time_us(small.linear_forward),
        "nn.Linear forward+backward": host_time_us(small.linear_forward_backward, small.clear_gradients),
        **on_the_calling_thread(small),
    }


def on_the_calling_thread(small: SmallLayer) -> dict[str, float]:
    """Autograd runs a GPU's part of backward on a thread of its own, and waking that one costs host time."""
    with torch.autograd.set_multithreading_enabled(False):
        return {
            "layer forward+backward, one thread": host_time_us(small.forward_backward, small.clear_gradients),
            "nn.Linear forward+backward, one thread": host_time_us(
                small.linear_forward_backward, small.clear_gradients
            ),
        }


def on_one_processor() -> dict[str, float]:
    """For a process of its own: the thread that is woken finds in the caches what the caller left there."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    small = SmallLayer()
    return {
        "layer forward, one processor": host_time_us(small.forward),
        "layer forward+backward, one processor": host_time_us(small.forward_backward, small.clear_gradients),
        "nn.Linear forward+backward, one processor": host_time_us(
            small.linear_forward_backward, small.clear_gradients
        ),
    }


def python_profile(call: Callable[[], object]) -> list[dict[str, Any]]:
    """The Python (and Cython) functions that take a call's time, by cProfile, whose own cost is included."""
    repeats = 500
    profile = cProfile.Profile()
    for _ in range(repeats // CALLS):
        torch.cuda.synchronize()
        profile.enable()
        for _ in range(CALLS):
            call()
        profile.disable()
    rows = []
    for (file, line, name), (_, calls, own, total, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        place = name if file == "~" else f"{_short(file)}:{line}({name})"
        rows.append(
            {
                "function": place,
                "calls": round(calls / repeats, 2),
                "own_us": round(own / repeats * 1e6, 2),
                "total_us": round(total / repeats * 1e6, 2),
            }
        )
    return sorted(rows, key=lambda row: -row["own_us"])[:TOP]


def operator_profile(call: Callable[[], object], before: Callable[[], object]) -> list[dict[str, Any]]:
    """The operators and CUDA runtime calls of a call, by torch.profiler, over all threads."""
    repeats = 100
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            before()
            call()
        torch.cuda.synchronize()
    rows = [
        {
            "operator": event.key,
            "calls": round(event.count / repeats, 2),
            "own_us": round(event.self_cpu_time_total / repeats, 2),
        }
        for event in profile.key_averages()
        if event.key != "cudaDeviceSynchronize"
    ]
    return sorted(rows, key=lambda row: -row["own_us"])[:TOP]


def _short(file: str) -> str:
    path = Path(file)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else "/".join(path.parts[-2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "host_time.json")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        raise SystemExit("host_time.py measures a layer on an NVIDIA GPU, and there is none here")

    small = SmallLayer()
    times = levels(small)
    with multiprocessing.get_context("spawn").Pool(1) as other:
        times |= other.apply(on_one_processor)
    for name, value in times.items():
        print(f"{name:40} {value:8.1f} us", flush=True)
    measured = {"forward": times["layer forward"], "forward_backward": times["layer forward+backward"]}
    for name, bar in BARS_US.items():
        print(
            f"{name}: {measured[name]} us, {'under' if measured[name] < bar else 'OVER'} the bar of {bar} us"
        )
    shape = {"T": TOKENS, "H": D_MODEL, "I": INTERMEDIATE, "E": EXPERTS, "K": TOP_K, "dtype": "bfloat16"}
    write(
        out,
        {
            **environment(),
            "sources": sources_digest(),
            "shape": shape,
            "calls": BATCHES * CALLS,
            "bars_us": BARS_US,
            "median_us": times,
            "profile_forward": python_profile(small.forward),
            "profile_forward_backward": operator_profile(small.forward_backward, small.clear_gradients),
        },
    )


if __name__ == "__main__":
    main()
