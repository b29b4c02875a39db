"""MoELayer against the reference, option by option and together; and how it behaves as a module."""

import copy
import io
import itertools
import pickle

import pytest
import torch

from ffmoe_torch import MoELayer, fused_moe, get_dense_params
from tests.torch.checks import LOSSES, SIZES, check_layer, make_layer, random_tokens, results, same

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

OPTIONS = {
    "plain": {},
    "losses": LOSSES,
    "aux loss": {"aux_loss_coeff": 0.5},
    "z-loss": {"z_loss_coeff": 0.5},
    "one expert a token": {"top_k": 1, **LOSSES},
    "every expert": {"top_k": 6, **LOSSES},
    "geglu": {"activation": "geglu", "num_shared_experts": 1},
    "relu_squared": {"activation": "relu_squared", "num_shared_experts": 1},
    "sigmoid": {"gating": "sigmoid", **LOSSES},
    "scores as they are": {"norm_topk_prob": False, "routed_scaling_factor": 2.5, **LOSSES},
    "groups": {"num_expert_groups": 3, "topk_groups": 2},
    "expert bias": {"expert_bias": True, "gating": "sigmoid"},
    "capacity factor": {"capacity_factor": 0.75, **LOSSES},
    "hard bound, heaviest": {"max_tokens_per_expert": 4, "drop_policy": "probs"},
    "bound that nothing exceeds": {"max_tokens_per_expert": 100, "allow_dropped_tokens": False},
    "recompute": {"recompute_activations": True, **LOSSES},
    "shared experts": {"num_shared_experts": 2, **LOSSES},
    "latent": {"latent_dim": 12, **LOSSES},
    "latent and shared experts": {"latent_dim": 12, "num_shared_experts": 1},
    "much at once": {
        "gating": "sigmoid",
        "norm_topk_prob": False,
        "expert_bias": True,
        "num_expert_groups": 2,
        "topk_groups": 1,
        "capacity_factor": 1.0,
        "drop_policy": "probs",
        "num_shared_experts": 1,
        "latent_dim": 20,
        "recompute_activations": True,
        **LOSSES,
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_each_option(device, poisoned, options, dtype):
    layer = make_layer(device, dtype, **OPTIONS[options])
    check_layer(layer, random_tokens(3, 7, device=device, dtype=dtype))


@pytest.mark.parametrize("options", ["plain", "losses", "shared experts", "latent", "much at once"])
def test_mask(device, poisoned, options):
    layer = make_layer(device, torch.float64, **OPTIONS[options])
    x = random_tokens(3, 7, device=device, dtype=torch.float64)
    mask = torch.rand(3, 7, device=device) < 0.7
    check_layer(layer, x, mask)
    output, _ = layer(x, mask)
    shared = layer.shared_expert(x) if layer.shared_expert else torch.zeros_like(x)
    torch.testing.assert_close(output[~mask], shared[~mask])
    assert int(layer.stats().tokens_per_expert.sum()) == int(mask.sum()) * layer.top_k


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("options", ["losses", "latent and shared experts"])
def test_leading_shapes(device, poisoned, options, shape):
    layer = make_layer(device, torch.float64, **OPTIONS[options])
    check_layer(layer, random_tokens(*shape, device=device, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_gate_in_a_16_bit_layer(device, dtype):
    layer = make_layer(device, dtype, **LOSSES)
    layer.gate.float()
    check_layer(layer, random_tokens(21, device=device, dtype=dtype))


def test_input_need_not_be_contiguous(device):
    layer = make_layer(device, num_shared_experts=1)
    x = random_tokens(5, 4, device=device).detach()
    for other in (x.transpose(0, 1), x.transpose(0, 1).reshape(20, -1).T.contiguous().T, x[::2], x[:, ::2]):
        output, _ = layer(other)
        assert torch.equal(output, layer(other.contiguous())[0])
    mask = (torch.rand(4, 5, device=device) < 0.5).T
    assert torch.equal(layer(x, mask)[0], layer(x, mask.contiguous())[0])


def test_gradients_need_not_be_contiguous(device):
    layer = make_layer(device, **LOSSES)
    x = random_tokens(6, device=device)
    layer(x)[0].sum().backward()  # an expanded scalar
    summed = x.grad.clone()
    x.grad = None
    output, _ = layer(x)
    output.backward(torch.ones_like(output))
    assert torch.equal(summed, x.grad)


def test_losses_alone_have_gradients(device):
    layer = make_layer(device, **LOSSES)
    x = random_tokens(9, device=device)
    output, losses = layer(x)
    gate = layer.gate.weight
    alone = torch.autograd.grad(sum(losses.values()), (x, gate, layer.w_up), retain_graph=True)
    both = torch.autograd.grad(sum(losses.values()) + output.sum(), (x, gate))
    one = torch.autograd.grad(layer(x)[0].sum(), (x, gate))
    assert not alone[2].any()
    for a, b, c in zip(alone, one, both, strict=False):
        torch.testing.assert_close(a + b, c)


@pytest.mark.parametrize("frozen", ["gate.weight", "w_up", "w_down", "everything"])
def test_frozen_parameters_get_no_gradient(device, frozen):
    layer, x = make_layer(device), random_tokens(9, device=device)
    want = results(layer, x)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in (name, "everything"))
    layer.zero_grad()
    x.grad = None
    layer(x)[0].sin().sum().backward()
    assert torch.equal(x.grad, want[1])
    for (_, parameter), grad in zip(layer.named_parameters(), want[2:], strict=True):
        assert torch.equal(parameter.grad, grad) if parameter.requires_grad else parameter.grad is None


def test_no_grad_and_inference_mode_give_the_same_bits(device):
    layer, x = make_layer(device, num_shared_experts=1, **LOSSES), random_tokens(9, device=device)
    want, _ = layer(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output, losses = layer(x)
        assert torch.equal(output, want)
        assert not output.requires_grad
        assert not any(loss.requires_grad for loss in losses.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(device, dtype):
    layer = make_layer(device, dtype, num_shared_experts=1, latent_dim=8, capacity_factor=1.0, **LOSSES)
    x = random_tokens(50, device=device, dtype=dtype)
    assert same(results(layer, x), results(layer, x))


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_expert": 3, "drop_policy": "probs"}])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputing_gives_the_same_bits(device, dtype, options):
    layer = make_layer(device, dtype, **options, **LOSSES)
    lean = make_layer(device, dtype, recompute_activations=True, **options, **LOSSES)
    lean.load_state_dict(layer.state_dict())
    x = random_tokens(40, device=device, dtype=dtype)
    assert same(results(layer, x), results(lean, x))


def test_fused_moe_is_the_layer_without_the_module(device):
    options = {"gating": "sigmoid", "capacity_factor": 1.0, "routed_scaling_factor": 2.0, **LOSSES}
    layer, x = make_layer(device, **options), random_tokens(3, 7, device=device)
    output, losses = fused_moe(x, layer.gate.weight, layer.w_up, layer.w_down, layer.top_k, **options)
    want, want_losses = layer(x)
    assert torch.equal(output, want)
    assert {name: loss.item() for name, loss in losses.items()} == {
        name: loss.item() for name, loss in want_losses.items()
    }


def test_fused_moe_with_every_input(device):
    layer, x = make_layer(device, expert_bias=True, latent_dim=8), random_tokens(3, 7, device=device)
    mask = torch.rand(3, 7, device=device) < 0.5
    output, losses = fused_moe(
        layer.proj_up(layer.proj_down(x)),
        layer.gate.weight,
        layer.w_up,
        layer.w_down,
        layer.top_k,
        router_input=x,
        expert_bias=layer.expert_bias,
        valid_mask=mask,
    )
    assert losses == {}
    assert torch.equal(layer.proj_up(layer.proj_down(output)), layer(x, mask)[0])


# --- jitter and injected losses ---


def test_jitter_is_for_the_router_in_training_only(device):
    layer, x = make_layer(device, jitter=0.3), random_tokens(9, device=device)
    plain = make_layer(device)
    plain.load_state_dict(layer.state_dict())
    torch.manual_seed(1)
    output, _ = layer(x)
    torch.manual_seed(1)
    noise = torch.empty_like(x).uniform_(0.7, 1.3)
    want, _ = fused_moe(x, layer.gate.weight, layer.w_up, layer.w_down, 2, router_input=x * noise)
    assert torch.equal(output, want)
    assert not torch.equal(output, plain(x)[0])
    assert torch.equal(layer.eval()(x)[0], plain(x)[0])


@pytest.mark.parametrize("shape", [(5, 24), (5, 1, 24)])
def test_the_output_may_be_changed_in_place_with_injected_losses(device, shape):
    layer = make_layer(device, aux_mode="inject", num_shared_experts=1, **LOSSES)
    x = random_tokens(5, device=device).detach().reshape(shape)
    gradients = []
    for add in (torch.add, torch.Tensor.add_):
        layer.zero_grad()
        add(layer(x)[0], x).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    assert same(*gradients)


def test_injected_losses_have_the_gradient_of_returned_ones(device):
    options = {"num_shared_experts": 1, **LOSSES}
    layer, x = (
        make_layer(device, torch.float64, **options),
        random_tokens(9, device=device, dtype=torch.float64),
    )
    injecting = make_layer(device, torch.float64, aux_mode="inject", **options)
    injecting.load_state_dict(layer.state_dict())
    assert same(results(layer, x), results(injecting, x, losses_too=False))
    _, losses = injecting(x)
    assert list(losses) == ["aux_loss", "z_loss"]
    assert not any(loss.requires_grad for loss in losses.values())


# --- the module ---


def test_names_shapes_and_dtypes():
    layer = make_layer(dtype=torch.bfloat16, num_shared_experts=2, latent_dim=5, expert_bias=True)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "gate.weight": (6, 24),
        "w_up": (6, 32, 24),
        "w_down": (6, 24, 16),
        "shared_expert.w_up": (64, 24),
        "shared_expert.w_down": (24, 32),
        "proj_down.weight": (5, 24),
        "proj_up.weight": (24, 5),
        "expert_bias": (6,),
    }
    assert {t.dtype for t in layer.parameters()} == {torch.bfloat16}
    assert layer.expert_bias.dtype == torch.float32
    assert list(make_layer().state_dict()) == ["w_up", "w_down", "gate.weight"]


def test_initial_values():
    layer = MoELayer(64, 96, 5, 2, num_shared_experts=1, expert_bias=True)
    # kaiming-uniform with a=sqrt(5): uniform up to 1/sqrt(fan_in), of each expert's own matrices
    for weights, bound in (
        (layer.gate.weight, 0.01 * 64**-0.5),
        *((expert, 64**-0.5) for expert in layer.w_up),
        *((expert, 48**-0.5) for expert in layer.w_down),
        (layer.shared_expert.w_up, 64**-0.5),
        (layer.shared_expert.w_down, 48**-0.5),
    ):
        assert 0.95 * bound < weights.abs().max() <= bound
        assert weights.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not layer.expert_bias.any()
    assert not torch.equal(layer.w_up[0], layer.w_up[1])


def test_meta_device_and_to_empty(device):
    layer = MoELayer(**SIZES, num_shared_experts=1, latent_dim=8, expert_bias=True, device="meta")
    assert all(t.is_meta for t in itertools.chain(layer.parameters(), layer.buffers()))
    layer.to_empty(device=device)
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    other = MoELayer(**SIZES, num_shared_experts=1, latent_dim=8, expert_bias=True, device=device)
    other.train()
    torch.manual_seed(5)
    other.reset_parameters()
    assert same([*layer.parameters(), *layer.buffers()], [*other.parameters(), *other.buffers()])
    check_layer(layer, random_tokens(9, device=device))


def test_weights_assigned_to_a_layer_on_the_meta_device(device):
    state = make_layer(device, expert_bias=True).state_dict()
    layer = MoELayer(**SIZES, expert_bias=True, device="meta")
    layer.load_state_dict(state, assign=True)
    whole = make_layer(device, expert_bias=True)
    whole.load_state_dict(state)
    x = random_tokens(9, device=device)
    for one in (layer, whole):
        for _ in range(2):
            one(x)
            one.update_expert_bias(0.1)
    assert torch.equal(layer.expert_bias, whole.expert_bias)
    whole(x)
    whole.load_state_dict({"gate.weight": whole.gate.weight}, strict=False)
    assert whole.expert_counts.any()  # still of this bias
    whole.load_state_dict(state)
    assert not whole.expert_counts.any()
    layer.load_state_dict({name: value.bfloat16() for name, value in state.items()}, assign=True)
    assert layer.expert_bias.dtype == torch.float32
    layer(x.bfloat16())


def test_deepcopy_and_pickle_of_a_compiled_layer():
    layer, x = make_layer(), random_tokens(9)
    layer.compile(backend="eager")
    want, _ = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], want)


def test_deepcopy_pickle_and_state_dict(device):
    layer = make_layer(device, num_shared_experts=1, latent_dim=8, expert_bias=True, **LOSSES)
    x = random_tokens(9, device=device)
    want = results(layer, x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = make_layer(device, num_shared_experts=1, latent_dim=8, expert_bias=True, **LOSSES)
    loaded.load_state_dict(torch.load(buffer))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert same(results(other, x), want)
        assert other.w_up.data_ptr() != layer.w_up.data_ptr()
        assert repr(other) == repr(layer)


def test_the_copy_has_statistics_of_its_own():
    layer = make_layer()
    layer(random_tokens(9))
    other = copy.deepcopy(layer)
    assert other.stats().tokens_per_expert.sum() == 0
    assert layer.stats().tokens_per_expert.sum() == 18


@pytest.mark.parametrize("convert", ["bfloat16", "half", "double"])
def test_expert_bias_stays_float32(convert):
    layer = make_layer(expert_bias=True)
    bias = layer.expert_bias.clone()
    getattr(torch.nn.Sequential(layer), convert)()
    assert layer.w_up.dtype != torch.float32
    assert layer.expert_bias.dtype == torch.float32
    assert torch.equal(layer.expert_bias, bias)
    assert "expert_bias" in dict(layer.named_buffers())
    check_layer(layer, random_tokens(9, dtype=layer.w_up.dtype))


def test_repr_says_what_is_not_the_default():
    assert (
        repr(MoELayer(16, 32, 4, 2)).splitlines()[1].strip()
        == "d_model=16, ffn_dim=32, num_experts=4, top_k=2"
    )
    text = repr(MoELayer(16, 32, 4, 2, gating="sigmoid", aux_loss_coeff=0.1, jitter=0.5, expert_bias=True))
    for part in ("gating='sigmoid'", "aux_loss_coeff=0.1", "jitter=0.5", "expert_bias=True"):
        assert part in text


def test_dense_and_expert_parameters():
    layer = make_layer(num_shared_experts=1, latent_dim=8)
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), layer)
    assert layer.expert_params == (layer.w_up, layer.w_down)
    dense = get_dense_params(model)
    assert [id(p) for p in dense] == [
        id(p) for name, p in model.named_parameters() if name not in ("1.w_up", "1.w_down")
    ]


def test_training_lowers_the_loss(device):
    layer = make_layer(device, num_shared_experts=1, **LOSSES)
    x = random_tokens(64, device=device).detach()
    target = x.roll(1, dims=1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    history = []
    for _ in range(40):
        output, losses = layer(x)
        loss = (output - target).square().mean()
        optimizer.zero_grad()
        (loss + sum(losses.values())).backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]
