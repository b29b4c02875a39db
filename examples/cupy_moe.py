"""A mixture of experts trained by hand: the core from CuPy alone, or with --cpu from NumPy. No framework.

The teacher cuts the plane of its inputs into regions and maps each by a matrix of its own, which is what a
mixture of experts can learn and one small network cannot.

    python examples/cupy_moe.py          # on the GPU
    python examples/cupy_moe.py --cpu    # the same code on NumPy arrays
"""

import argparse
import math
import sys
from types import ModuleType
from typing import Any

from ffmoe_core import MoEConfig, moe_backward, moe_forward

WIDTH, HIDDEN, EXPERTS, TOP_K, REGIONS = 32, 64, 8, 2, 8
TOKENS, STEPS, LEARNING_RATE = 512, 400, 1e-2
DECAY, SQUARE_DECAY = 0.9, 0.99  # of Adam's two averages
GOAL = 0.05  # of the variance left unexplained

Array = Any  # of NumPy or CuPy
Parameters = dict[str, Array]


class Teacher:
    """y = A[c] x, where c is the centre nearest to x."""

    def __init__(self, xp: ModuleType, random: Any) -> None:
        self.xp = xp
        self.centres = normal(random, (REGIONS, WIDTH), 1.0)
        self.maps = normal(random, (REGIONS, WIDTH, WIDTH), WIDTH**-0.5)

    def examples(self, random: Any, count: int) -> tuple[Array, Array]:
        """Inputs around the centres and their outputs: float32 [count, WIDTH] each."""
        region = random.integers(0, REGIONS, count)
        x = self.centres[region] + normal(random, (count, WIDTH), 0.5)
        nearest = ((x[:, None] - self.centres) ** 2).sum(-1).argmin(-1)
        return x, self.xp.einsum("tij,tj->ti", self.maps[nearest], x)


class Adam:
    """Kingma & Ba 2015, on a dict of arrays."""

    def __init__(self, xp: ModuleType, parameters: Parameters) -> None:
        self.xp = xp
        self.parameters = parameters
        self.mean = {name: xp.zeros_like(value) for name, value in parameters.items()}
        self.square = {name: xp.zeros_like(value) for name, value in parameters.items()}
        self.steps = 0

    def step(self, gradients: Parameters, rate: float) -> None:
        self.steps += 1
        scale = rate * math.sqrt(1 - SQUARE_DECAY**self.steps) / (1 - DECAY**self.steps)
        for name, gradient in gradients.items():
            self.mean[name] += (1 - DECAY) * (gradient - self.mean[name])
            self.square[name] += (1 - SQUARE_DECAY) * (gradient**2 - self.square[name])
            self.parameters[name] -= scale * self.mean[name] / (self.xp.sqrt(self.square[name]) + 1e-8)


def normal(random: Any, shape: tuple[int, ...], scale: float) -> Array:
    return scale * random.standard_normal(shape, dtype="float32")


def new_parameters(random: Any) -> Parameters:
    return {
        "gate_weight": normal(random, (EXPERTS, WIDTH), 0.01),
        "w_up": normal(random, (EXPERTS, 2 * HIDDEN, WIDTH), WIDTH**-0.5),
        "w_down": normal(random, (EXPERTS, WIDTH, HIDDEN), HIDDEN**-0.5),
    }


def train(xp: ModuleType) -> float:
    """Train, printing as it goes; returns the share of fresh examples' variance left unexplained."""
    random = xp.random.default_rng(0)
    config = MoEConfig(
        d_model=WIDTH, ffn_dim=2 * HIDDEN, num_experts=EXPERTS, top_k=TOP_K, aux_loss_coeff=0.01
    )
    teacher = Teacher(xp, random)
    parameters = new_parameters(random)
    optimizer = Adam(xp, parameters)
    grad_losses = xp.asarray([1, 0, 0], dtype="float32")  # the balance loss counts as it is
    for step in range(1, STEPS + 1):
        x, y = teacher.examples(random, TOKENS)
        result = moe_forward(x, **parameters, config=config)
        error = result.output - y
        grads = moe_backward(
            2 / error.size * error, result.saved, x, **parameters, config=config, grad_losses=grad_losses
        )
        gradients = {name: getattr(grads, name) for name in parameters}
        optimizer.step(gradients, LEARNING_RATE * (1 - step / STEPS))
        if step == 1 or step % (STEPS // 10) == 0:
            loss, aux = float((error**2).mean()), float(result.losses[0])
            print(f"step {step:4}  squared error {loss:.4f}  balance loss {aux:.4f}", flush=True)
    x, y = teacher.examples(random, 4 * TOKENS)
    output = moe_forward(x, **parameters, config=config, save_for_backward=False).output
    return float(((output - y) ** 2).mean() / y.var())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="NumPy arrays instead of CuPy's")
    if parser.parse_args().cpu:
        import numpy as xp
    else:
        try:
            import cupy as xp
        except ModuleNotFoundError:
            parser.error("CuPy is not installed: pip install 'ffmoe[cuda13]' (or cuda12), or use --cpu")
    unexplained = train(xp)
    print(f"unexplained variance on fresh examples: {unexplained:.1%} (the goal is {GOAL:.0%})")
    return 0 if unexplained < GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
