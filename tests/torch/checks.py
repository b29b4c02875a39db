"""What several files of the adapter's tests do: build a layer, and hold it against the reference."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from ffmoe_torch import MoELayer
from tests import reference
from tests.support import assert_close

SIZES = {"d_model": 24, "ffn_dim": 32, "num_experts": 6, "top_k": 2}
LOSSES = {"aux_loss_coeff": 0.1, "z_loss_coeff": 0.01}
ACTIVATIONS = {
    "swiglu": F.silu,
    "geglu": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu_squared": lambda gate: F.relu(gate) ** 2,
}


def make_layer(device="cpu", dtype=torch.float32, **options):
    """A small layer whose router has an opinion: the gate's usual initial weights are nearly zero."""
    layer = MoELayer(**{**SIZES, **options}, device=device, dtype=dtype)
    with torch.no_grad():
        layer.gate.weight.mul_(100)
        if layer.expert_bias is not None:
            layer.expert_bias.uniform_(-0.2, 0.2)
    return layer


def random_tokens(*shape, device="cpu", dtype=torch.float32):
    """x [*shape, d_model], a leaf that wants a gradient."""
    return torch.randn(*shape, SIZES["d_model"], dtype=dtype).to(device).requires_grad_()


def numbers(tensor):
    """A tensor of any dtype and device as float64 NumPy."""
    return tensor.detach().double().cpu().numpy()


class ReferenceMoE(torch.autograd.Function):
    """The reference's routed experts in a float64 graph of torch: (output [T, H], losses [3])."""

    @staticmethod
    def forward(ctx, config, expert_bias, valid_mask, x, router_input, gate_weight, w_up, w_down):
        arrays = [None if t is None else t.numpy() for t in (x, router_input, gate_weight, w_up, w_down)]
        x, router_input, *weights = arrays
        ctx.config, ctx.arrays = config, arrays
        ctx.result = reference.moe_forward(
            x, *weights, config, router_input=router_input, expert_bias=expert_bias, valid_mask=valid_mask
        )
        return torch.from_numpy(ctx.result.output), torch.from_numpy(ctx.result.losses)

    @staticmethod
    def backward(ctx, grad_output, grad_losses):
        x, router_input, *weights = ctx.arrays
        grads = reference.moe_backward(
            grad_output.numpy(),
            ctx.result,
            x,
            *weights,
            ctx.config,
            router_input=router_input,
            grad_losses=grad_losses.numpy(),
        )
        grads = (grads.x, grads.router_input, grads.gate_weight, grads.w_up, grads.w_down)
        return None, None, None, *(None if g is None else torch.from_numpy(g) for g in grads)


def reference_layer(layer, x, valid_mask=None):
    """What ``layer(x)`` should be, in float64: output, losses, x and parameters, with their graph."""
    config = layer.config
    p = {name: t.detach().double().cpu().requires_grad_() for name, t in layer.named_parameters()}
    leaf = x.detach().double().cpu().requires_grad_()
    tokens = leaf.reshape(-1, layer.d_model)

    def through_latent(t):
        return t if layer.latent_dim is None else t @ p["proj_down.weight"].T @ p["proj_up.weight"].T

    output, losses = ReferenceMoE.apply(
        config,
        None if layer.expert_bias is None else numbers(layer.expert_bias),
        None if valid_mask is None else valid_mask.reshape(-1).cpu().numpy(),
        through_latent(tokens),
        None if layer.latent_dim is None else tokens,
        p["gate.weight"],
        p["w_up"],
        p["w_down"],
    )
    output = through_latent(output)
    if layer.num_shared_experts:
        gate, up = (tokens @ p["shared_expert.w_up"].T).chunk(2, dim=-1)
        output = output + (ACTIVATIONS[config.activation](gate) * up) @ p["shared_expert.w_down"].T
    named = {"aux_loss": losses[0], "z_loss": losses[1]}
    return SimpleNamespace(
        output=output.reshape(x.shape),
        losses={name: named[name] for name in named if getattr(config, f"{name}_coeff") > 0},
        x=leaf,
        parameters=p,
    )


def check_layer(layer, x, valid_mask=None, call=None):
    """Output, losses and every gradient of ``layer(x)``, or ``call(x)``, are the reference's."""
    dtype = str(x.dtype).removeprefix("torch.")
    router = "float64" if dtype == "float64" else "float32"
    want = reference_layer(layer, x, valid_mask)
    layer.zero_grad()
    x.grad = None
    output, losses = (layer if call is None else call)(x, valid_mask)
    assert output.shape == x.shape
    assert output.dtype == x.dtype
    assert list(losses) == list(want.losses)
    grad = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)
    torch.autograd.backward(
        [output, *losses.values()], [grad.to(x.device), *(torch.full_like(t, 3) for t in losses.values())]
    )
    torch.autograd.backward(
        [want.output, *want.losses.values()],
        [grad.double(), *(torch.full_like(t, 3) for t in want.losses.values())],
    )
    assert_close(numbers(output), numbers(want.output), dtype, "output")
    for name, loss in losses.items():
        assert loss.shape == ()
        assert_close(numbers(loss)[None], numbers(want.losses[name])[None], router, name)
    assert_close(numbers(x.grad), numbers(want.x.grad), dtype, "gradient of x")
    pairs = x.numel() // layer.d_model * layer.top_k
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        got, expected = numbers(parameter.grad), numbers(want.parameters[name].grad)
        # the router's gradients come from differences of one number a pair, which may cancel altogether
        router_part = {"scale": 1.0, "independent": pairs} if name == "gate.weight" else {}
        assert_close(got, expected, dtype, f"gradient of {name}", **router_part)


def results(call, x, *, losses_too=True):
    """Output, losses, gradients of x and of every parameter of the module ``call``, all as copies."""
    call.zero_grad()
    x.grad = None
    output, losses = call(x)
    total = output.sin().sum()
    (total + sum(losses.values()) if losses_too else total).backward()
    grads = [parameter.grad.clone() for parameter in call.parameters()]
    return [output.detach().clone(), *(t.detach().clone() for t in losses.values()), x.grad.clone(), *grads]


def same(ones, others):
    """Whether two lists of tensors hold the same bits."""
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def close(ones, others, rtol):
    """Whether each tensor is that near to its counterpart, by the norm."""
    return len(ones) == len(others) and all(
        np.linalg.norm(numbers(a) - numbers(b)) <= rtol * np.linalg.norm(numbers(b)) + 1e-30
        for a, b in zip(ones, others, strict=True)
    )
