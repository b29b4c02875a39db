"""Every mistake a user of the adapter can make is refused by its own error, which names it."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from ffmoe_core import errors
from ffmoe_torch import MoELayer, clip_grad_norm_, communicator, fused_moe, get_dense_params
from tests.torch.checks import SIZES, make_layer, random_tokens


def label(value):
    """A test's name from its parameters; functions have none that every process would agree on."""
    if isinstance(value, dict):
        return ",".join(name if callable(v) else f"{name}={v}" for name, v in value.items())[:50]
    return "change" if callable(value) and not isinstance(value, type) else str(value)[:50]


BAD_OPTIONS = [
    ({"d_model": 0}, errors.ConfigError, "d_model=0"),
    ({"ffn_dim": 31}, errors.ConfigError, "ffn_dim=31 is odd"),
    ({"num_experts": 1025}, errors.ConfigError, "num_experts=1025"),
    ({"top_k": 7}, errors.ConfigError, "top_k=7.*num_experts=6"),
    ({"activation": "relu"}, errors.ConfigError, "activation='relu'.*'swiglu', 'geglu', 'relu_squared'"),
    ({"gating": "argmax"}, errors.ConfigError, "gating='argmax'.*'softmax', 'sigmoid'"),
    ({"num_shared_experts": -1}, errors.ConfigError, "num_shared_experts=-1.*at least 0"),
    ({"num_shared_experts": 1.5}, errors.ConfigError, "num_shared_experts=1.5"),
    ({"latent_dim": 0}, errors.ConfigError, "latent_dim=0.*at least 1"),
    ({"jitter": 1.0}, errors.ConfigError, "jitter=1.0"),
    ({"jitter": -0.1}, errors.ConfigError, "jitter=-0.1"),
    ({"jitter": "a little"}, errors.ConfigError, "jitter='a little'"),
    ({"aux_mode": "add"}, errors.ConfigError, "aux_mode='add'.*'return', 'inject'"),
    ({"capacity_factor": -1.0}, errors.ConfigError, "capacity_factor=-1.0"),
    ({"aux_loss_coeff": -1.0}, errors.ConfigError, "aux_loss_coeff=-1.0"),
    ({"num_expert_groups": 4, "topk_groups": 2}, errors.ConfigError, "num_expert_groups=4.*num_experts=6"),
    ({"expert_bias": 1}, errors.ConfigError, "expert_bias=1 must be True or False"),
    ({"main_grad": "no"}, errors.ConfigError, "main_grad='no' must be True or False"),
    ({"recompute_activations": 0}, errors.ConfigError, "recompute_activations=0 must be True or False"),
    ({"dtype": torch.int32}, errors.DTypeError, "dtype=torch.int32.*torch.bfloat16"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=label)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        MoELayer(**{**SIZES, **options})


def test_options_of_the_function(device):
    layer, x = make_layer(device), random_tokens(5, device=device)
    for options, message in [
        ({"top_k": 7}, "top_k=7.*num_experts=6"),
        ({"top_k": 2, "activation": "relu"}, "activation='relu'.*'swiglu'"),
        ({"top_k": 2, "num_expert_groups": 2}, "num_expert_groups=2.*topk_groups=None"),
        ({"top_k": 2, "recompute_activations": "no"}, "recompute_activations='no' must be True or False"),
        ({"top_k": 2.0}, "top_k=2.0 must be an int"),  # though it equals the 2 of the call before
        ({"top_k": 2, "norm_topk_prob": 1}, "norm_topk_prob=1 must be True or False"),
    ]:
        fused_moe(x, layer.gate.weight, layer.w_up, layer.w_down, 2)
        with pytest.raises(errors.ConfigError, match=message):
            fused_moe(x, layer.gate.weight, layer.w_up, layer.w_down, **options)


@pytest.mark.parametrize("compiled", [False, True])
def test_kinds_of_options_however_the_function_is_called(compiled):
    """Autocast and compilers hand options to an operator, which would make a bool of a 1, or tell of its schema."""
    layer, x = make_layer("cpu"), random_tokens(5).detach()
    call = torch.compile(fused_moe, fullgraph=True, backend="eager") if compiled else fused_moe
    for options, message in [
        ({"top_k": True}, "top_k=True must be an int"),
        ({"top_k": "2"}, "top_k='2' must be an int"),
        ({"top_k": [2]}, r"top_k=\[2\] must be an int"),
        ({"top_k": 2, "norm_topk_prob": 1}, "norm_topk_prob=1 must be True or False"),
        ({"top_k": 2, "activation": ["swiglu"]}, r"activation=\['swiglu'\] must be a str"),
        ({"top_k": 2, "capacity_factor": "1"}, "capacity_factor='1' must be a number or None"),
    ]:
        # a compiler that follows the call tells of the error as its own
        error = Exception if compiled else errors.ConfigError
        with pytest.raises(error, match=message), torch.autocast("cpu", torch.bfloat16, enabled=not compiled):
            call(x, layer.gate.weight, layer.w_up, layer.w_down, **options)


def test_floats_of_numpy(device):
    """NumPy's float64 is a float of Python; compilers and the capacity take it as one."""
    x = random_tokens(5, device=device)
    layer = make_layer(device, capacity_factor=np.float64(1.25), aux_loss_coeff=np.float64(0.1))
    assert {type(layer.config.aux_loss_coeff), type(layer.config.capacity_factor)} == {float}
    layer(x)
    fused_moe(x, layer.gate.weight, layer.w_up, layer.w_down, 2, capacity_factor=np.float64(1.25))


def test_what_is_no_tensor():
    layer, x = make_layer("cpu", main_grad=True), random_tokens(5).detach()
    for wrong in (x.numpy(), [[0.0] * 24], "x", None):
        with pytest.raises(
            errors.DTypeError, match=f"x is a {type(wrong).__name__}; expected a torch.Tensor"
        ):
            layer(wrong)
    with pytest.raises(errors.DTypeError, match=r"valid_mask is a list"):
        layer(x, [True] * 5)
    with pytest.raises(errors.LayoutError, match=r"x has layout torch\.sparse_coo"):
        layer(x.to_sparse())
    weights = {
        "gate_weight": layer.gate.weight,
        "w_up": layer.w_up,
        "w_down": layer.w_down,
        "expert_bias": None,
    }
    for name in weights:
        with pytest.raises(errors.DTypeError, match=f"{name} is a list"):
            fused_moe(x, **weights | {name: [0.0]}, top_k=2)
    layer.w_up.main_grad = [1]
    with pytest.raises(errors.DTypeError, match=r"w_up\.main_grad is a list"):
        layer(x)
    with pytest.raises(errors.ConfigError, match="model is a generator"):
        clip_grad_norm_(layer.parameters(), 1.0)
    with pytest.raises(errors.ConfigError, match="model is a list"):
        get_dense_params([layer])


@pytest.mark.parametrize("name", ["d_model", "ffn_dim", "num_experts", "top_k"])
def test_sizes_stay_as_they_were_made(name):
    with pytest.raises(AttributeError, match=name):
        setattr(make_layer("cpu"), name, 4)


BAD_INPUTS = [
    (lambda x: (x[..., :23],), errors.ShapeError, r"x has shape \(5, 23\).*d_model=24"),
    (lambda x: (x[0, 0],), errors.ShapeError, r"x has shape \(\)"),
    (
        lambda x: (x.double(),),
        errors.DTypeError,
        r"x has dtype torch\.float64 but the layer has torch\.float32",
    ),
    (
        lambda x: (x.half(),),
        errors.DTypeError,
        r"x has dtype torch\.float16 but the layer has torch\.float32",
    ),
    (lambda x: (x.int(),), errors.DTypeError, r"x has dtype torch\.int32 but the layer has torch\.float32"),
    (lambda x: (x.to("meta"),), errors.DeviceError, "x is on meta but the layer is on"),
    (
        lambda x: (x, torch.ones(4, dtype=torch.bool)),
        errors.ShapeError,
        r"valid_mask has shape \(4,\).*\(5,\)",
    ),
    (lambda x: (x, torch.ones(5)), errors.DTypeError, r"valid_mask has dtype torch\.float32.*torch\.bool"),
]


@pytest.mark.parametrize(
    "options", [{}, {"latent_dim": 4}, {"jitter": 0.1}, {"num_shared_experts": 1}], ids=label
)
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS, ids=label)
def test_inputs(device, change, error, message, options):
    layer, x = make_layer(device, **options), random_tokens(5, device=device).detach()
    with pytest.raises(error, match=message):
        layer(*change(x))
    layer(x)


def test_autocast_takes_no_integers(device):
    layer, x = make_layer(device), random_tokens(5, device=device).detach()
    with torch.autocast(device, dtype=torch.bfloat16):
        layer(x.half())
        with pytest.raises(errors.DTypeError, match=r"x has dtype torch\.float64"):
            layer(x.double())
        with pytest.raises(errors.DTypeError, match=r"x has dtype torch\.int32"):
            layer(x.int())


def test_nccl_without_a_process_group_is_for_all_of_mpi(monkeypatch):
    asked = []
    monkeypatch.setattr(communicator, "_new", lambda *arguments: asked.append(arguments[:3]))
    monkeypatch.setattr(communicator, "_made_over", lambda group: {})
    for backend in ("auto", "nccl"):
        communicator.communicator_for(None, backend, 60.0, torch.device("cuda:0"))
    assert asked == [(None, "nccl", 60.0)] * 2
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    monkeypatch.setattr(communicator, "_mpi_ranks", lambda: 1)
    for backend in ("auto", "nccl", "mpi"):
        with pytest.raises(errors.ConfigError, match="init_process_group before"):
            communicator.communicator_for(None, backend, 60.0, torch.device("cuda:0"))
    with pytest.raises(errors.ConfigError, match="ep_backend='torch' needs an ep_group"):
        communicator.communicator_for(None, "torch", 60.0, torch.device("cpu"))


BAD_WEIGHTS = [
    ({"gate_weight": lambda t: t[0]}, errors.ShapeError, r"gate_weight has shape \(24,\)"),
    ({"gate_weight": lambda t: t[:5]}, errors.ShapeError, r"w_up has shape \(6, 32, 24\).*\(5, 32, 24\)"),
    ({"gate_weight": lambda t: t[:, :20]}, errors.ShapeError, "x has shape.*d_model=20"),
    (
        {"w_up": lambda t: t[:, :30].contiguous()},
        errors.ShapeError,
        r"w_up has shape \(6, 30, 24\).*\(6, 32, 24\)",
    ),
    ({"w_down": lambda t: t[0]}, errors.ShapeError, r"w_down has shape \(24, 16\)"),
    ({"w_down": lambda t: t[:, :20].contiguous()}, errors.ShapeError, r"w_down has shape \(6, 20, 16\)"),
    ({"w_up": lambda t: t.mT.contiguous().mT}, errors.LayoutError, "w_up is not C-contiguous"),
    ({"w_down": lambda t: t.double()}, errors.DTypeError, "w_down has dtype float64 but x has float32"),
    ({"router_input": lambda t: t[:, :3]}, errors.ShapeError, r"router_input has shape \(5, 3\)"),
    ({"router_input": lambda t: t[:3]}, errors.ShapeError, r"router_input has shape \(3, 24\)"),
    ({"expert_bias": lambda t: t[:3]}, errors.ShapeError, r"expert_bias has shape \(3,\)"),
    ({"expert_bias": lambda t: t.half()}, errors.DTypeError, "expert_bias has dtype float16.*float32"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_WEIGHTS, ids=label)
def test_inputs_of_the_function(device, change, error, message):
    layer, x = make_layer(device, expert_bias=True), random_tokens(5, device=device).detach()
    inputs = {
        "x": x,
        "gate_weight": layer.gate.weight.detach(),
        "w_up": layer.w_up.detach(),
        "w_down": layer.w_down.detach(),
        "router_input": x,
        "expert_bias": layer.expert_bias,
    }
    for name, function in change.items():
        inputs[name] = function(inputs[name])
    with pytest.raises(error, match=message):
        fused_moe(**inputs, top_k=2)


@pytest.mark.parametrize("max_norm", [float("nan"), -1.0, "1", None])
def test_clipping_needs_a_norm(max_norm):
    layer = make_layer()
    layer(random_tokens(5))[0].sum().backward()
    before = layer.w_up.grad.clone()
    with pytest.raises(errors.ConfigError, match="max_norm="):
        clip_grad_norm_(layer, max_norm)
    assert torch.equal(layer.w_up.grad, before)
    assert clip_grad_norm_(layer, float("inf")) > 0
    assert torch.equal(layer.w_up.grad, before)
    assert clip_grad_norm_(torch.nn.Identity(), 1.0) == 0


@pytest.mark.parametrize("bound", [{"capacity_factor": 0.5}, {"max_tokens_per_expert": 2}], ids=str)
def test_capacity_overflow(device, bound):
    layer = make_layer(device, allow_dropped_tokens=False, **bound)
    with pytest.raises(errors.CapacityError, match=r"expert \d: \d+ rows.*allow_dropped_tokens=True"):
        layer(random_tokens(30, device=device))
    layer(random_tokens(1, device=device))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(device, monkeypatch, value):
    layer, x = make_layer(device), random_tokens(9, device=device)
    with torch.no_grad():
        x[4, 2] = value
    output, _ = layer(x)
    output.sum().backward()
    clean = torch.ones(9, dtype=torch.bool, device=device)
    clean[4] = False
    assert torch.isfinite(output[clean]).all()
    monkeypatch.setenv("FFMOE_CHECK", "1")
    with pytest.raises(errors.NonFiniteError, match="token 4"):
        layer(x)
    layer(x[clean])


@pytest.mark.gpu
def test_devices_mixed():
    layer = make_layer("cuda")
    with pytest.raises(errors.DeviceError, match="cpu"):
        layer(random_tokens(5))


@pytest.mark.gpu
def test_a_cuda_tensor_without_cupy_names_what_to_install():
    script = """
import sys
sys.modules["cupy"] = None  # as if it were not installed
import torch
from ffmoe_core.errors import MissingDependencyError
from ffmoe_torch import MoELayer
try:
    MoELayer(8, 8, 2, 1, device="cuda")(torch.randn(3, 8, device="cuda"))
except MissingDependencyError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'ffmoe[cuda" in run.stdout


@pytest.mark.gpu
def test_out_of_memory_leaves_the_layer_usable():
    layer, x = make_layer("cuda"), random_tokens(64, device="cuda")
    want, _ = layer(x)
    large = torch.zeros(1 << 18, 24, device="cuda")
    # of this process: others may be at work on the GPU
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        with pytest.raises(errors.OutOfMemoryError):
            layer(large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del large
    assert torch.equal(layer(x)[0], want)
