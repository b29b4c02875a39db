"""A small selection of work for compute-sanitizer; also runs by itself.

    compute-sanitizer --tool memcheck python tests/cuda/sanitize.py

Every allocation is its own (CuPy's memory pool is off), so that a read or write past the end of an array
lands outside of any allocation and is seen. Each result is compared with the CPU backend's: a sanitizer
that watched kernels do nothing would find nothing.
"""

import os
import sys
from dataclasses import dataclass, field
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from ffmoe_core import MoEConfig, moe_backward, moe_forward

# relative distance (2-norm) to the CPU backend's result, in float32 at least, for the same rounded inputs
TOLERANCES = {"float64": 1e-11, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}

# the architecture's own kernels, and those for every architecture
KERNELS: tuple[dict[str, str], ...] = ({}, {"FFMOE_PORTABLE_KERNELS": "1"})


@dataclass(frozen=True)
class Case:
    name: str
    dtype: str
    sizes: tuple[int, int, int, int, int]  # T, H, I, E, K
    options: dict[str, Any] = field(default_factory=dict)
    masked: bool = False


WIDE = (70, 64, 48, 5, 2)  # widths of the fast path; rows that fill no tile
ODD = (33, 37, 19, 3, 2)  # widths of the other one
CASES = (
    Case("bfloat16", "bfloat16", WIDE, {"aux_loss_coeff": 0.1, "z_loss_coeff": 0.1}),
    Case("bfloat16, odd widths", "bfloat16", ODD),
    Case("bfloat16, rows past one tile", "bfloat16", (300, 136, 72, 2, 2), {"activation": "geglu"}),
    Case("bfloat16, capacity by position", "bfloat16", WIDE, {"capacity_factor": 0.5}),
    Case("bfloat16, recomputed", "bfloat16", WIDE, {"recompute_activations": True}),
    Case("bfloat16, many experts", "bfloat16", (40, 32, 16, 130, 8)),
    Case("bfloat16, several tiles a block", "bfloat16", (400, 72, 520, 20, 3)),
    Case("float16", "float16", WIDE, {"activation": "relu_squared"}, masked=True),
    Case("float32", "float32", WIDE, {"aux_loss_coeff": 0.1, "z_loss_coeff": 0.1}),
    Case("float32, odd widths", "float32", ODD, {"gating": "sigmoid"}, masked=True),
    Case(
        "float32, capacity by weight", "float32", WIDE, {"max_tokens_per_expert": 9, "drop_policy": "probs"}
    ),
    Case("float32, groups", "float32", (21, 40, 24, 8, 3), {"num_expert_groups": 4, "topk_groups": 2}),
    Case("float32, every expert", "float32", (9, 24, 8, 4, 4), {"norm_topk_prob": False}),
    Case("float32, one token", "float32", (1, 16, 8, 4, 1)),
    Case("float32, no token", "float32", (0, 16, 8, 4, 2)),
    Case("float64", "float64", ODD),
)


def run(case: Case, on_gpu: bool) -> list[np.ndarray]:
    """Output, losses and every gradient, on the host."""
    T, H, I, E, K = case.sizes
    random = np.random.default_rng(0)
    shapes = ((T, H), (T, H), (E, H), (E, 2 * I, H), (E, H, I))
    scales = (1.0, 1.0, 1.0, H**-0.5, I**-0.5)
    dtype = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)
    values = [
        (random.standard_normal(shape) * scale).astype(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    mask = (random.random(T) < 0.8) if case.masked else None
    grad_losses = np.array([1.0, 1.0, 0.0], "float64" if case.dtype == "float64" else "float32")
    if on_gpu:
        values = [cupy.asarray(value) for value in values]
        mask = None if mask is None else cupy.asarray(mask)
        grad_losses = cupy.asarray(grad_losses)
    elif case.dtype not in ("float32", "float64"):
        values = [value.astype(np.float32) for value in values]

    x, grad_output, *weights = values
    config = MoEConfig(d_model=H, ffn_dim=2 * I, num_experts=E, top_k=K, **case.options)
    result = moe_forward(x, *weights, config, valid_mask=mask)
    grads = moe_backward(grad_output, result.saved, x, *weights, config, grad_losses=grad_losses)
    arrays = [result.output, result.losses, grads.x, grads.gate_weight, grads.w_up, grads.w_down]
    return [(cupy.asnumpy(array) if on_gpu else array).astype(np.float64) for array in arrays]


def worst_distance(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    distances = [
        np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-6)
        for a, b in zip(got, expected, strict=True)
    ]
    return float(max(distances))


def main() -> int:
    cupy.cuda.set_allocator(None)
    wrong = 0
    for case in CASES:
        expected = run(case, on_gpu=False)
        for kernels in KERNELS if case.dtype in ("bfloat16", "float16") else KERNELS[:1]:
            os.environ.update(kernels)
            distance = worst_distance(run(case, on_gpu=True), expected)
            ok = distance <= TOLERANCES[case.dtype]  # False for NaN
            wrong += not ok
            label = ", ".join((case.name, *kernels))
            print(f"{'ok' if ok else 'WRONG':5}  {label:56} {distance:.1e} from the CPU's", flush=True)
            for name in kernels:
                del os.environ[name]
    cupy.cuda.Device().synchronize()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
