"""The losses of a call: by name, and as part of the output's gradient."""

from typing import Any

import torch
from torch import Tensor


def losses_by_name(losses: Tensor, aux_loss_coeff: float, z_loss_coeff: float) -> dict[str, Tensor]:
    """The losses that have a coefficient, as 0-d tensors."""
    named = {}
    if aux_loss_coeff > 0:
        named["aux_loss"] = losses[0]
    if z_loss_coeff > 0:
        named["z_loss"] = losses[1]
    return named


class InjectLosses(torch.autograd.Function):
    """Passes ``output`` through, and gives every loss the gradient 1 in backward.

    What ``(loss + sum(losses)).backward()`` does, without the losses having to reach the training loop. ``output``
    itself comes out, not a view, which torch would let nobody change in place. A compiler that follows this wants a
    view; where it begins anew behind this it must not find one, as it makes views again without their Function.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, losses: Tensor) -> Tensor:
        ctx.save_for_backward(losses)
        if torch.compiler.is_compiling():
            return output.view_as(output)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (losses,) = ctx.saved_tensors
        return grads[0], torch.ones_like(losses)
