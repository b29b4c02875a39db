"""main_grad=True: the gradients of the experts' weights go into the caller's float32 sums."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ffmoe_core import errors
from tests.support import assert_close
from tests.torch.checks import LOSSES, make_layer, numbers, random_tokens, reference_layer, results

NAMES = ("w_up", "w_down")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def sums_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_sums(layer, fill=0.0):
    """The layer, its experts' weights with a ``main_grad`` that is ``fill`` everywhere."""
    for weight in layer.expert_params:
        weight.main_grad = torch.full_like(weight, fill, dtype=sums_dtype(weight.dtype), requires_grad=False)
    return layer


def twins(device, dtype=torch.float32, **options):
    """A layer with ``main_grad=True``, and the same without."""
    layer = make_layer(device, dtype, main_grad=True, **options)
    plain = make_layer(device, dtype, **options)
    plain.load_state_dict(layer.state_dict())
    return with_sums(layer), plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [LOSSES, {"recompute_activations": True}, {"latent_dim": 16, "num_shared_experts": 1}], ids=str
)
def test_it_is_the_gradient_unrounded(device, poisoned, options, dtype):
    layer, plain = twins(device, dtype, **options)
    x = random_tokens(21, device=device, dtype=dtype)
    output, losses = plain(x)
    grad = torch.randn_like(output)
    (sum(losses.values()) + (output * grad).sum()).backward()
    x_grad, x.grad = x.grad, None
    output, losses = layer(x)
    (sum(losses.values()) + (output * grad).sum()).backward()
    assert torch.equal(x.grad, x_grad)
    for (name, parameter), other in zip(layer.named_parameters(), plain.parameters(), strict=True):
        if name not in NAMES:
            assert torch.equal(parameter.grad, other.grad)
            continue
        assert parameter.grad is None
        assert torch.equal(parameter.main_grad.to(dtype), other.grad)
        assert dtype == sums_dtype(dtype) or not torch.equal(parameter.main_grad, other.grad.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backward_adds_the_references_gradient(device, dtype):
    layer = with_sums(make_layer(device, dtype, main_grad=True), fill=0.5)
    want = dict.fromkeys(NAMES, 0.5)
    for tokens in (21, 34):
        x = random_tokens(tokens, device=device, dtype=dtype)
        reference = reference_layer(layer, x)
        grad = torch.randn(x.shape, dtype=torch.float64).to(dtype)
        reference.output.backward(grad.double())
        layer(x)[0].backward(grad.to(device))
        for name in NAMES:
            want[name] = want[name] + numbers(reference.parameters[name].grad)
    for name in NAMES:
        got = getattr(layer, name).main_grad
        assert got.dtype == sums_dtype(dtype)
        assert_close(numbers(got), want[name], str(dtype).removeprefix("torch."), name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_backward_adds_once(device, use_reentrant):
    layer, plain = twins(device)
    x = random_tokens(21, device=device)
    checkpoint(lambda x: layer(x)[0].sin(), x, use_reentrant=use_reentrant).sum().backward()
    _, _, *grads = results(plain, x)
    wanted = dict(zip(dict(plain.named_parameters()), grads, strict=True))
    for name in NAMES:
        assert torch.equal(getattr(layer, name).main_grad, wanted[name])


def test_only_weights_with_a_gradient_need_it(device):
    layer, x = make_layer(device, main_grad=True), random_tokens(9, device=device)
    with torch.no_grad():
        layer(x)
    layer.w_up.requires_grad_(False)
    layer.w_down.main_grad = torch.zeros_like(layer.w_down, requires_grad=False)
    layer(x)[0].sum().backward()
    assert layer.w_down.main_grad.any()
    assert layer.w_up.grad is None
    assert layer.w_down.grad is None


def test_hooks_on_the_parameters_still_run(device):
    layer, ran = with_sums(make_layer(device, main_grad=True)), []
    for name in NAMES:
        getattr(layer, name).register_post_accumulate_grad_hook(
            lambda p, name=name: ran.append((name, p.grad, bool(p.main_grad.any())))
        )
    layer(random_tokens(9, device=device))[0].sum().backward()
    assert sorted(ran) == [("w_down", None, True), ("w_up", None, True)]


BAD_SUMS = [
    (lambda w: None, errors.ConfigError, "w_up has no main_grad.*float32.*shape"),
    (
        lambda w: torch.zeros_like(w, dtype=torch.float64),
        errors.DTypeError,
        "w_up.main_grad has dtype.*float32",
    ),
    (lambda w: torch.zeros_like(w[1:]), errors.ShapeError, r"w_up.main_grad has shape \(5, 32, 24\)"),
    (lambda w: torch.zeros_like(w, device="meta"), errors.DeviceError, "w_up.main_grad is on meta"),
    (lambda w: w.mT.contiguous().mT, errors.LayoutError, "w_up.main_grad is not contiguous"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_SUMS, ids=lambda v: getattr(v, "__name__", None))
def test_sums_that_do_not_fit(device, make, error, message):
    layer, x = with_sums(make_layer(device, main_grad=True)), random_tokens(9, device=device)
    layer.w_up.main_grad = make(layer.w_up.detach())
    with pytest.raises(error, match=message):
        layer(x)
    assert not layer.w_down.main_grad.any()


class Idle(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_where_it_cannot_work(device):
    layer, x = with_sums(make_layer(device, main_grad=True)), random_tokens(9, device=device)
    unsupported = pytest.raises(
        errors.UnsupportedError, match="main_grad=True works in plain eager calls only"
    )
    with torch.autocast(device, dtype=torch.bfloat16), unsupported:
        layer(x)
    with Idle(), unsupported:
        layer(x)
    output = layer(x)[0].sum()
    with Idle(), unsupported:
        output.backward()
    output = layer(x)[0].sum()
    with unsupported:
        torch.autograd.grad(output, x, create_graph=True)
    assert not any(weight.main_grad.any() for weight in layer.expert_params)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compilation_is_refused(device, fullgraph):
    torch._dynamo.reset()
    layer, x = with_sums(make_layer(device, main_grad=True)), random_tokens(9, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=fullgraph)
    kind = torch._dynamo.exc.Unsupported if fullgraph else errors.UnsupportedError
    with pytest.raises(kind, match="main_grad=True works in plain eager calls only"):
        compiled(x)


def test_repr():
    assert "main_grad=True" in repr(make_layer(main_grad=True))
    assert "main_grad" not in repr(make_layer())
