"""What torch does with the operators: gradcheck, opcheck, autocast, checkpoints, compilation, transforms."""

import contextlib
import functools
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from ffmoe_core.arrays import DType, as_array
from ffmoe_core.errors import DeviceError, UnsupportedError
from ffmoe_torch import MoELayer, fused_moe, operators
from tests.torch.checks import (
    LOSSES,
    SIZES,
    check_layer,
    close,
    make_layer,
    numbers,
    random_tokens,
    results,
    same,
)

GRADCHECK = {
    "plain": {},
    "sigmoid": {"gating": "sigmoid"},
    "scores as they are": {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "sigmoid scores as they are": {"gating": "sigmoid", "norm_topk_prob": False},
    "one expert a token": {"top_k": 1, "norm_topk_prob": False},
    "groups": {"num_expert_groups": 2, "topk_groups": 1},
    "capacity": {"capacity_factor": 0.75},
    "heaviest": {"max_tokens_per_expert": 3, "drop_policy": "probs"},
    "geglu": {"activation": "geglu"},
    "relu_squared": {"activation": "relu_squared"},
    "recompute": {"recompute_activations": True},
    "no loss": {"aux_loss_coeff": 0.0, "z_loss_coeff": 0.0},
    "no loss, scaled": {"aux_loss_coeff": 0.0, "z_loss_coeff": 0.0, "routed_scaling_factor": 1.5},
}


@pytest.mark.parametrize("inputs", ["x alone", "every input"])
@pytest.mark.parametrize("options", GRADCHECK)
def test_gradcheck(device, options, inputs):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device).requires_grad_()

    x, router_input, gate, up, down = leaf(7, 5), leaf(7, 5), leaf(4, 5), leaf(4, 6, 5), leaf(4, 5, 3)
    options = {"top_k": 2, **LOSSES, **GRADCHECK[options]}
    if inputs == "every input":
        options["expert_bias"] = torch.tensor([0.1, -0.1, 0.2, 0.0], device=device)
        options["valid_mask"] = torch.tensor([True, True, False, True, True, True, False], device=device)

    def call(x, router_input, gate, up, down):
        routed = router_input if inputs == "every input" else None
        output, losses = fused_moe(x, gate, up, down, router_input=routed, **options)
        return output, *losses.values()

    # finite differences must not change who goes where: the inputs are random and the steps 1e-6
    assert torch.autograd.gradcheck(call, (x, router_input, gate, up, down), check_undefined_grad=True)


def operator_arguments(device, dtype, *, every_input, keep, requires_grad, loss_coeff=0.1):
    """Arguments of ``ffmoe::moe``."""
    tensors = {
        "x": torch.randn(6, 8, dtype=dtype),
        "router_input": torch.randn(6, 8, dtype=dtype) if every_input else None,
        "gate_weight": torch.randn(4, 8, dtype=dtype),
        "w_up": torch.randn(4, 12, 8, dtype=dtype),
        "w_down": torch.randn(4, 8, 6, dtype=dtype),
        "expert_bias": torch.randn(4) if every_input else None,
        "valid_mask": torch.rand(6) < 0.7 if every_input else None,
    }
    moved = [None if t is None else t.to(device) for t in tensors.values()]
    for t in moved[:5]:
        if t is not None:
            t.requires_grad_(requires_grad)
    options = (
        2,
        "swiglu",
        "softmax",
        True,
        1.0,
        None,
        None,
        1.0,
        None,
        True,
        "position",
        loss_coeff,
        loss_coeff,
    )
    return *moved, *options, keep


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("loss_coeff", [0.0, 0.1])
@pytest.mark.parametrize("every_input", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(device, poisoned, dtype, every_input, loss_coeff, keep):
    # poisoned: the bytes between the routing block's fields belong to nobody, and opcheck compares them
    arguments = operator_arguments(
        device, dtype, every_input=every_input, keep=keep, requires_grad=True, loss_coeff=loss_coeff
    )
    torch.library.opcheck(torch.ops.ffmoe.moe.default, arguments)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("loss_coeff", [0.0, 0.1])
@pytest.mark.parametrize("every_input", [True, False])
def test_opcheck_of_the_backward_operator(device, poisoned, every_input, loss_coeff, keep):
    arguments = operator_arguments(
        device, torch.float32, every_input=every_input, keep=keep, requires_grad=False, loss_coeff=loss_coeff
    )
    output, losses, logits, z, routing = torch.ops.ffmoe.moe.default(*arguments)
    assert logits.shape == ((6, 4) if loss_coeff else (0,))
    arguments = (
        torch.randn_like(output),
        torch.randn_like(losses) if every_input else None,
        *arguments[:5],
        logits if loss_coeff else None,
        z if keep else None,
        routing,
        *arguments[7:-1],
    )
    torch.library.opcheck(torch.ops.ffmoe.moe_backward.default, arguments)


def test_poison_reaches_the_runtime(device, poisoned):
    """The fixture does what the tests that use it count on: new memory of the runtime is full of NaN."""
    _, space = as_array(torch.zeros(1, device=device))
    fresh = space.export(space.empty((1000,), DType.FLOAT32))
    assert fresh.isnan().all()


# --- with the operators and without ---


class Watch(TorchDispatchMode):
    """Changes nothing, and remembers the project's operators it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ffmoe":
            self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


STRAIGHT = {
    "plain": {},
    "losses": LOSSES,
    "injected": {"aux_mode": "inject", **LOSSES},
    "lean": {"recompute_activations": True, **LOSSES},
    "latent": {"latent_dim": 12, "expert_bias": True, "capacity_factor": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", STRAIGHT)
def test_the_operators_and_the_runtime_alone_give_the_same_bits(device, poisoned, options, dtype):
    layer = make_layer(device, dtype, **STRAIGHT[options])
    x = random_tokens(21, device=device, dtype=dtype)
    with Watch() as watch:
        want = results(layer, x)
    assert watch.seen == ["ffmoe::moe", "ffmoe::moe_backward"]
    assert same(results(layer, x), want)
    with torch.no_grad(), Watch() as watch:
        assert torch.equal(layer(x)[0], want[0])
    assert watch.seen == ["ffmoe::moe"]


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_a_plain_call_does_without_the_operators(device, monkeypatch, mode):
    def refuse(*arguments):
        raise AssertionError("an operator was called")

    monkeypatch.setattr(operators, "_moe", refuse)
    monkeypatch.setattr(operators, "_moe_backward", refuse)
    layer, x = make_layer(device, **LOSSES), random_tokens(9, device=device)
    with mode():
        output, losses = layer(x)
        fused_moe(x, layer.gate.weight, layer.w_up, layer.w_down, 2)
    if output.requires_grad:
        (output.sum() + sum(losses.values())).backward()
    with pytest.raises(AssertionError), Watch():  # so that this test can fail
        layer(x)


def test_a_mode_of_backward_alone_sees_its_operator(device):
    layer, x = make_layer(device), random_tokens(9, device=device)
    want = results(layer, x, losses_too=False)
    layer.zero_grad()
    x.grad = None
    total = layer(x)[0].sin().sum()
    with Watch() as watch:
        total.backward()
    assert watch.seen == ["ffmoe::moe_backward"]
    assert same([x.grad, *(p.grad for p in layer.parameters())], want[1:])


def test_tensors_that_are_not_ordinary(device):
    class Subclass(torch.Tensor):
        pass

    layer, x = make_layer(device), random_tokens(9, device=device).detach()
    assert type(layer(x.as_subclass(Subclass))[0]) is Subclass
    bare = MoELayer(**SIZES, device="meta")
    assert bare(x.to("meta"))[0].is_meta
    with pytest.raises(DeviceError, match="on the meta device, without memory"):
        bare(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        output, _ = layer(torch.empty(3, 24, device=device))
    assert type(output) is FakeTensor
    assert output.shape == (3, 24)


def test_selective_checkpoint_decides_on_the_operator(device):
    layer, x = make_layer(device), random_tokens(9, device=device)
    runs = []

    def policy(ctx, operator, *args, **kwargs):
        if operator.namespace == "ffmoe":
            runs.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    want = results(layer, x, losses_too=False)
    layer.zero_grad()
    x.grad = None
    output = checkpoint(lambda x: layer(x)[0].sin(), x, use_reentrant=False, context_fn=contexts)
    output.sum().backward()
    assert runs
    assert same([x.grad, *(p.grad for p in layer.parameters())], want[1:])


def test_imported_under_a_mode():
    """What was switched on at the import is not taken for the ordinary state."""
    script = """
import torch
with torch.autocast("cpu", dtype=torch.bfloat16):
    from ffmoe_torch import MoELayer
    layer = MoELayer(8, 8, 2, 1)
    assert layer(torch.randn(3, 8))[0].dtype == torch.bfloat16
assert layer(torch.randn(3, 8))[0].dtype == torch.float32
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.gpu
def test_a_process_that_imported_it_can_fork():
    """Autograd's threads for GPUs, which no child has, start with the first backward, and not with the import."""
    script = """
import os
import torch
import ffmoe_torch
layer = ffmoe_torch.MoELayer(8, 8, 2, 1)
layer(torch.randn(3, 8))
child = os.fork()
if child == 0:
    torch.ones(1, requires_grad=True).sum().backward()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- autocast ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(device, dtype):
    layer = make_layer(device, num_shared_experts=1, latent_dim=16, expert_bias=True, **LOSSES)
    x = random_tokens(3, 7, device=device)
    with torch.autocast(device, dtype=dtype):
        output, losses = layer(x)
    assert output.dtype == dtype
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    (output.float().sum() + sum(losses.values())).backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    assert x.grad.dtype == torch.float32


def test_autocast_is_a_layer_of_rounded_parameters(device):
    layer, x = make_layer(device, expert_bias=True, **LOSSES), random_tokens(9, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        output, losses = layer(x)
    rounded = make_layer(device, torch.bfloat16, expert_bias=True, **LOSSES)
    rounded.load_state_dict(layer.state_dict())
    want, want_losses = rounded(x.bfloat16())
    assert torch.equal(output, want)
    assert all(torch.equal(losses[name], want_losses[name]) for name in losses)


def test_autocast_leaves_float64_alone(device):
    layer, x = make_layer(device, torch.float64), random_tokens(9, device=device, dtype=torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        output, _ = layer(x)
    assert torch.equal(output, layer(x)[0])


# --- checkpointing ---


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("losses", [LOSSES, {}], ids=["losses", "no loss"])
@pytest.mark.parametrize("recompute", [True, False])
def test_checkpoint_gives_the_same_bits(device, use_reentrant, recompute, losses):
    """With jitter too: the second forward draws the same noise and routes the same way."""
    layer = make_layer(device, jitter=0.3, num_shared_experts=1, recompute_activations=recompute, **losses)
    x = random_tokens(21, device=device)
    routes = []

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def remember(self, x):
            output, losses = self.layer(x)
            routes.append(self.layer.stats().tokens_per_expert.clone())
            return output, *losses.values()

        def forward(self, x):
            output, *losses = checkpoint(self.remember, x, use_reentrant=use_reentrant)
            return output, dict(enumerate(losses))

    torch.manual_seed(3)
    want = results(layer, x)
    torch.manual_seed(3)
    with set_checkpoint_early_stop(False):  # so that the second forward runs to where routes are remembered
        got = results(Wrapped(), x)
    assert same(got, want)
    assert len(routes) == 2
    assert torch.equal(*routes)


# --- compilation ---


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layer(device, fresh_compiler, backend):
    """In one graph, with every part of the layer, at numbers of tokens it was not compiled for."""
    options = {"num_shared_experts": 1, "latent_dim": 16, "expert_bias": True, **LOSSES}
    layer = make_layer(device, torch.float64, **options)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for shape in ((2, 7), (3, 8), (1, 5)):
        layer.expert_counts.zero_()
        x = random_tokens(*shape, device=device, dtype=torch.float64)
        check_layer(layer, x, call=compiled)
        counts = layer.stats().tokens_per_expert
        assert int(counts.sum()) == 2 * shape[0] * shape[1]
        assert torch.equal(layer.expert_counts, counts.long())
        assert 0 < layer.stats().router_entropy < 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aux_loss_coeff": 0.1, "aux_mode": "inject"},
        {"recompute_activations": True, "capacity_factor": 1.0},
        {"jitter": 0.3},
    ],
    ids=str,
)
def test_compiled_options(device, fresh_compiler, options):
    layer, x = (
        make_layer(device, torch.float64, **options),
        random_tokens(9, device=device, dtype=torch.float64),
    )
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    mask = torch.rand(9, device=device) < 0.7
    torch.manual_seed(3)
    want, want_losses = layer(x, mask)
    want.sin().sum().backward()
    want_grad, x.grad = x.grad, None
    torch.manual_seed(3)
    output, losses = compiled(x, mask)
    output.sin().sum().backward()
    assert torch.equal(output, want)
    torch.testing.assert_close(x.grad, want_grad)
    assert list(losses) == list(want_losses)


def test_compiled_autocast(device, fresh_compiler):
    layer, x = make_layer(device, **LOSSES), random_tokens(9, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        want = results(layer, x)
        got = results(compiled, x)
    assert got[0].dtype == torch.bfloat16
    assert close(got, want, 1e-2)


@pytest.mark.slow
def test_compiled_training_step(device, fresh_compiler):
    """fused_moe inside a function that inductor has more to do in."""
    layer, x = make_layer(device), random_tokens(9, device=device)

    @torch.compile(fullgraph=True)
    def step(x, gate, up, down):
        output, losses = fused_moe(torch.tanh(x.t()).t() * 2, gate, up, down, 2, **LOSSES)
        return (output * output).sum() + losses["aux_loss"] + losses["z_loss"]

    tensors = (x, layer.gate.weight, layer.w_up, layer.w_down)
    got = torch.autograd.grad(step(*tensors), tensors)
    want = torch.autograd.grad(step._torchdynamo_orig_callable(*tensors), tensors)
    assert close(got, want, 1e-5)


def test_export(fresh_compiler):
    layer, x = make_layer(num_shared_experts=1, **LOSSES).eval(), random_tokens(9).detach()
    program = torch.export.export(layer, (x,), strict=True)
    output, losses = program.module()(x)
    want, want_losses = layer(x)
    assert torch.equal(output, want)
    assert torch.equal(losses["aux_loss"], want_losses["aux_loss"])


# --- what cannot work says so ---


@pytest.mark.parametrize(
    "transform",
    [
        lambda call, x: torch.func.vmap(call)(x),
        lambda call, x: torch.func.grad(lambda x: call(x).sum())(x),
        lambda call, x: torch.func.jvp(call, (x,), (x,)),
        lambda call, x: torch.func.jacrev(call)(x),
        lambda call, x: torch.func.functionalize(call)(x),
    ],
    ids=["vmap", "grad", "jvp", "jacrev", "functionalize"],
)
def test_transforms_are_refused(device, transform):
    layer, x = make_layer(device), random_tokens(2, 5, device=device).detach()
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        transform(lambda x: layer(x)[0], x)
    layer(x)  # and leave nothing behind


def test_second_derivatives_are_refused(device):
    layer, x = make_layer(device), random_tokens(5, device=device)
    (gradient,) = torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        gradient.square().sum().backward()
    layer(x)[0].sum().backward()


def test_forward_mode_is_refused(device):
    layer, x = make_layer(device), random_tokens(5, device=device).detach()
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad])
def test_forward_mode_is_refused_where_nothing_is_recorded(device, mode):
    layer, x = make_layer(device).requires_grad_(False), random_tokens(5, device=device).detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with mode():
            layer(x)
            with pytest.raises(UnsupportedError, match="forward-mode"):
                layer(dual)
            with pytest.raises(UnsupportedError, match="forward-mode"), torch.autocast(device):
                layer(dual)


def test_functional_call_and_batched_backward_work(device):
    layer, x = make_layer(device, torch.float64), random_tokens(3, device=device, dtype=torch.float64)
    parameters = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    doubled = MoELayer(24, 32, 6, 2, device=device, dtype=torch.float64)
    doubled.load_state_dict(parameters)
    assert torch.equal(torch.func.functional_call(layer, parameters, (x,))[0], doubled(x)[0])
    jacobians = [
        torch.autograd.functional.jacobian(lambda x: layer(x)[0], x, vectorize=vectorize)
        for vectorize in (False, True)
    ]
    assert numbers(jacobians[0]).any()
    torch.testing.assert_close(*jacobians)
