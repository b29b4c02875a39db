"""A small selection of layers that between them launch nearly every kernel, for what is too slow to run everything.

Each result is compared with the CPU backend's: a tool that watched kernels do nothing would find nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from ffmoe_core import (
    MoEConfig,
    glu_down,
    glu_down_backward,
    glu_up,
    glu_up_backward,
    moe_backward,
    moe_forward,
)

# relative distance (2-norm) to the CPU backend's result, in float32 at least, for the same rounded inputs
TOLERANCES = {"float64": 1e-11, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Case:
    name: str
    dtype: str
    sizes: tuple[int, int, int, int, int]  # T, H, I, E, K
    options: dict[str, Any] = field(default_factory=dict)
    masked: bool = False

    @property
    def has_kernels_of_its_own(self) -> bool:
        """Whether some architecture has other kernels for it than the portable ones."""
        return self.dtype in ("bfloat16", "float16")


WIDE = (70, 64, 48, 5, 2)  # widths of the fast path; rows that fill no tile
ODD = (33, 37, 19, 3, 2)  # widths of the other one
CASES = (
    Case("bfloat16", "bfloat16", WIDE, {"aux_loss_coeff": 0.1, "z_loss_coeff": 0.1}),
    Case("bfloat16, odd widths", "bfloat16", ODD),
    Case("bfloat16, rows past one tile", "bfloat16", (300, 136, 72, 8, 2), {"activation": "geglu"}),
    Case("bfloat16, capacity by position", "bfloat16", WIDE, {"capacity_factor": 0.5}),
    Case("bfloat16, recomputed", "bfloat16", WIDE, {"recompute_activations": True}),
    Case("bfloat16, many experts", "bfloat16", (40, 32, 16, 130, 8)),
    Case("bfloat16, several tiles a block", "bfloat16", (400, 72, 520, 24, 3)),
    Case("float16", "float16", (70, 64, 48, 16, 2), {"activation": "relu_squared"}, masked=True),
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
    Case("float64, capacity by weight", "float64", ODD, {"max_tokens_per_expert": 9, "drop_policy": "probs"}),
)


def run(
    case: Case, to_device: Callable[[np.ndarray], Any], to_host: Callable[[Any], np.ndarray]
) -> list[np.ndarray]:
    """Output, losses and every gradient, of the layer and of its first expert as a dense block, on the host."""
    T, H, I, E, K = case.sizes
    random = np.random.default_rng(0)
    shapes = ((T, H), (T, H), (E, H), (E, 2 * I, H), (E, H, I))
    scales = (1.0, 1.0, 1.0, H**-0.5, I**-0.5)
    dtype = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)
    x, grad_output, *weights = (
        to_device((random.standard_normal(shape) * scale).astype(dtype))
        for shape, scale in zip(shapes, scales, strict=True)
    )
    mask = to_device(random.random(T) < 0.8) if case.masked else None
    grad_losses = to_device(np.array([1.0, 1.0, 0.0], "float64" if case.dtype == "float64" else "float32"))

    config = MoEConfig(d_model=H, ffn_dim=2 * I, num_experts=E, top_k=K, **case.options)
    result = moe_forward(x, *weights, config, valid_mask=mask)
    grads = moe_backward(grad_output, result.saved, x, *weights, config, grad_losses=grad_losses)
    arrays = [result.output, result.losses, grads.x, grads.gate_weight, grads.w_up, grads.w_down]
    w_up, w_down = (weight[0] for weight in weights[1:])
    a, z = glu_up(x, w_up, config.activation, spared=2)
    dz, dw_down = glu_down_backward(grad_output, z, w_down, config.activation, spared=2)
    arrays += [glu_down(a, w_down, spared=2), *glu_up_backward(dz, x, w_up), dw_down]
    return [to_host(array).astype(np.float64) for array in arrays]


def run_on_cpu(case: Case) -> list[np.ndarray]:
    """The same by the CPU backend, in float32 at least, for the same rounded inputs."""

    def widened(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32) if values.dtype.itemsize == 2 else values

    return run(case, widened, np.asarray)


def worst_distance(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    distances = [
        np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-6)
        for a, b in zip(got, expected, strict=True)
    ]
    return float(max(distances))


@contextmanager
def portable_kernels() -> Iterator[None]:
    """Keeps to the kernels for every architecture."""
    os.environ["FFMOE_PORTABLE_KERNELS"] = "1"
    try:
        yield
    finally:
        del os.environ["FFMOE_PORTABLE_KERNELS"]
