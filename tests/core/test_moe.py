"""The whole layer, forward and backward, against the reference."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffmoe_core import MoEConfig, moe_backward, moe_forward
from ffmoe_core.errors import UnsupportedError
from tests.core.checks import check_layer, routing_parts, run_layer
from tests.core.test_routing import router_configs
from tests.support import (
    DTYPES,
    assert_close,
    bits,
    numbers,
    random_layer,
    rounded,
    router_dtype,
    same_bits,
)

BASE = MoEConfig(d_model=24, ffn_dim=32, num_experts=6, top_k=2, aux_loss_coeff=0.01, z_loss_coeff=0.001)

OPTIONS = {
    "plain": {},
    "one expert a token": {"top_k": 1},
    "every expert": {"top_k": 6},
    "geglu": {"activation": "geglu"},
    "relu_squared": {"activation": "relu_squared"},
    "sigmoid": {"gating": "sigmoid"},
    "sigmoid as it is": {"gating": "sigmoid", "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "softmax as it is": {"norm_topk_prob": False, "routed_scaling_factor": 0.5},
    "groups": {"num_expert_groups": 3, "topk_groups": 2, "top_k": 3},
    "groups of one": {"num_expert_groups": 6, "topk_groups": 3},
    "capacity factor": {"capacity_factor": 0.75},
    "capacity factor, heaviest": {"capacity_factor": 0.75, "drop_policy": "probs"},
    "hard bound": {"max_tokens_per_expert": 2},
    "both bounds": {"capacity_factor": 1.25, "max_tokens_per_expert": 5, "drop_policy": "probs"},
    "large losses": {"aux_loss_coeff": 10.0, "z_loss_coeff": 10.0},
    "recompute": {"recompute_activations": True},
    "scaled": {"routed_scaling_factor": 2.5},
    "scaled, bounded": {"routed_scaling_factor": 0.3, "max_tokens_per_expert": 2},
}
LOSSES = {
    "both losses": {},
    "aux loss": {"z_loss_coeff": 0.0},
    "z-loss": {"aux_loss_coeff": 0.0},
    "no loss": {"aux_loss_coeff": 0.0, "z_loss_coeff": 0.0},
}
INPUTS = {
    "x alone": (),
    "router_input": ("router_input",),
    "expert_bias": ("expert_bias",),
    "valid_mask": ("valid_mask",),
    "all": ("router_input", "expert_bias", "valid_mask"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("options", OPTIONS)
def test_each_option(kind, options, losses, dtype):
    config = replace(BASE, **{**LOSSES[losses], **OPTIONS[options]})
    check_layer(kind, config, random_layer(config, 25, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("inputs", INPUTS)
def test_each_input(kind, inputs, losses, dtype):
    config = replace(BASE, **LOSSES[losses])
    check_layer(kind, config, random_layer(config, 25, dtype), dtype, options=INPUTS[inputs])


@st.composite
def layers(draw):
    """A dtype, and any layer: every option with every other."""
    dtype = draw(st.sampled_from(DTYPES))
    router = draw(router_configs(max_experts=8))
    bounds = draw(st.sampled_from(["none", "factor", "hard", "both"]))
    # in 16 bits the sums of a few products may cancel to less than their rounding
    wide = dtype in ("bfloat16", "float16")
    return dtype, replace(
        router,
        d_model=draw(st.sampled_from([16, 17, 40] if wide else [1, 3, 8, 20, 33])),
        ffn_dim=2 * draw(st.sampled_from([16, 17, 40] if wide else [1, 3, 8, 20, 33])),
        activation=draw(st.sampled_from(["swiglu", "geglu", "relu_squared"])),
        capacity_factor=draw(st.sampled_from([0.5, 1.0, 1.25])) if bounds in ("factor", "both") else None,
        max_tokens_per_expert=draw(st.integers(1, 8)) if bounds in ("hard", "both") else None,
        drop_policy=draw(st.sampled_from(["position", "probs"])),
        recompute_activations=draw(st.booleans()),
    )


@settings(max_examples=500)
@given(
    case=layers(),
    num_tokens=st.sampled_from([0, 1, 2, 5, 17]),
    float32_gate=st.booleans(),
    inputs=st.sampled_from(sorted(INPUTS)),
    seed=st.integers(0, 99),
)
def test_options_together(kind, case, num_tokens, float32_gate, inputs, seed):
    dtype, config = case
    gate_dtype = "float32" if float32_gate and dtype != "float64" else dtype
    layer = random_layer(config, num_tokens, dtype, seed=seed, gate_dtype=gate_dtype)
    check_layer(kind, config, layer, dtype, gate_dtype=gate_dtype, options=INPUTS[inputs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden", "width", "num_tokens"),
    [(1, 1, 3), (7, 5, 9), (8, 8, 8), (64, 32, 33), (65, 63, 31), (130, 72, 20), (40, 136, 70)],
)
def test_widths(kind, hidden, width, num_tokens, dtype):
    """Widths that divide by 8 or a tile, and widths that divide by nothing."""
    config = replace(BASE, d_model=hidden, ffn_dim=2 * width, num_experts=3)
    check_layer(kind, config, random_layer(config, num_tokens, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(kind, num_tokens, losses, dtype):
    config = replace(BASE, **LOSSES[losses])
    layer = random_layer(config, num_tokens, dtype)
    check_layer(kind, config, layer, dtype, options=("router_input", "expert_bias"))


def test_one_expert(kind):
    config = replace(BASE, num_experts=1, top_k=1)
    check_layer(kind, config, random_layer(config, 9, "float32"), "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"capacity_factor": 1.0}, {"max_tokens_per_expert": 1}])
def test_one_hot_expert(kind, options, dtype):
    """All tokens want the same expert first; some experts get nothing."""
    config = replace(BASE, num_experts=16, **options)
    layer = random_layer(config, 40, dtype)
    layer.expert_bias[:] = 0
    layer.expert_bias[11] = 100
    layer.expert_bias[3:8] = -100
    want, _ = check_layer(kind, config, layer, dtype, options=("expert_bias",))
    assert want.tokens_per_expert[11] == 40
    assert (want.tokens_per_expert[3:8] == 0).all()
    assert want.kept.all() == (not options)


def test_every_token_left_out(kind):
    layer = random_layer(BASE, 9, "float32")
    layer.valid_mask[:] = False
    want, wanted = check_layer(kind, BASE, layer, "float32", options=("valid_mask",))
    assert not any(part.any() for part in (want.output, want.losses, wanted.x, wanted.w_up))


def test_tokens_all_of_whose_pairs_are_dropped(kind):
    config = replace(BASE, max_tokens_per_expert=1)
    want, _ = check_layer(kind, config, random_layer(config, 40, "float32"), "float32")
    gone = ~want.kept.any(axis=1)
    assert gone.any()
    assert (want.output[gone] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"max_tokens_per_expert": 3, "drop_policy": "probs", "gating": "sigmoid"}]
)
def test_recomputing_gives_the_same_bits(kind, options, dtype):
    config = replace(BASE, **options)
    layer = random_layer(config, 40, dtype)
    kept, kept_grads = run_layer(kind, config, layer, dtype)
    config = replace(config, recompute_activations=True)
    lean, lean_grads = run_layer(kind, config, layer, dtype)
    assert kept.saved.z is not None
    assert lean.saved.z is None
    assert bits(kind, kept.output) == bits(kind, lean.output)
    assert same_bits(kind, kept_grads, lean_grads)


@pytest.mark.parametrize("options", [{}, {**LOSSES["no loss"], "recompute_activations": True}], ids=str)
def test_nothing_is_kept_when_no_backward_follows(kind, options):
    config = replace(BASE, **options)
    layer = random_layer(config, 9, "float32")
    inputs = [kind.array(getattr(layer, name), "float32") for name in ("x", "gate_weight", "w_up", "w_down")]
    kept = moe_forward(*inputs, config)
    bare = moe_forward(*inputs, config, save_for_backward=False)
    assert kept.saved is not None
    assert bare.saved is None
    for name in ("output", "losses"):
        assert bits(kind, getattr(bare, name)) == bits(kind, getattr(kept, name))
    with pytest.raises(UnsupportedError, match="save_for_backward=False"):
        moe_backward(inputs[0], bare.saved, *inputs, config)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, False),
        ({"routed_scaling_factor": 2.5, "capacity_factor": 0.5}, False),
        ({"aux_loss_coeff": 0.01}, True),
        ({"z_loss_coeff": 0.01}, True),
        ({"gating": "sigmoid"}, True),
        ({"norm_topk_prob": False}, True),
    ],
    ids=str,
)
def test_logits_are_kept_where_weights_do_not_say_enough(kind, options, kept):
    config = replace(BASE, **{**LOSSES["no loss"], **options})
    result, _ = run_layer(kind, config, random_layer(config, 9, "float32"), "float32")
    assert config.keeps_logits == kept
    assert (result.saved.logits is not None) == kept


@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": False}, {"gating": "sigmoid"}], ids=str)
def test_a_loss_without_a_coefficient_has_no_gradient(kind, options):
    """Whatever comes back to it."""
    config = replace(BASE, **LOSSES["no loss"], **options)
    layer = random_layer(config, 9, "float32")
    _, grads = run_layer(kind, config, layer, "float32")
    layer.grad_losses[:] = np.nan
    _, others = run_layer(kind, config, layer, "float32")
    assert same_bits(kind, grads, others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [("w_up", "w_down"), ("w_up",), ("w_down",)], ids=str)
def test_weight_gradients_added_to_buffers(kind, given, dtype):
    layer, W = random_layer(BASE, 25, dtype), router_dtype(dtype)
    inputs = [kind.array(getattr(layer, name), dtype) for name in ("x", "gate_weight", "w_up", "w_down")]
    d_out = kind.array(layer.grad_output, dtype)
    saved = moe_forward(*inputs, BASE).saved
    plain = moe_backward(d_out, saved, *inputs, BASE)
    sums = {f"{name}_grad": kind.full(getattr(layer, name).shape, 0, W) for name in given}
    grads = moe_backward(d_out, saved, *inputs, BASE, **sums)
    for name in grads._fields:
        if name in given:
            assert getattr(grads, name) is None
            once = numbers(kind, sums[f"{name}_grad"])
            # unrounded: the gradient is what they round to
            assert np.array_equal(rounded(once, dtype), numbers(kind, getattr(plain, name)))
            assert dtype == W or not np.array_equal(rounded(once, dtype), once)
        elif getattr(plain, name) is not None:
            assert bits(kind, getattr(grads, name)) == bits(kind, getattr(plain, name))
    before = {name: numbers(kind, array) for name, array in sums.items()}
    moe_backward(d_out, saved, *inputs, BASE, **sums)
    for name, array in sums.items():
        assert np.array_equal(numbers(kind, array), 2 * before[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_written_and_returned(kind, dtype):
    layer = random_layer(BASE, 9, dtype)
    plain, _ = run_layer(kind, BASE, layer, dtype)
    out = kind.full((9, BASE.d_model), np.nan, dtype)
    result, _ = run_layer(kind, BASE, layer, dtype, out=out)
    assert result.output is out
    assert bits(kind, out) == bits(kind, plain.output)


def test_results_are_of_the_callers_kind(kind):
    result, grads = run_layer(
        kind,
        BASE,
        random_layer(BASE, 9, "bfloat16"),
        "bfloat16",
        gate_dtype="float32",
        options=("router_input",),
    )
    output, losses, routing, saved = result
    assert saved.routing is routing
    parts = {"output": output, "losses": losses, **saved._asdict(), **grads._asdict()}
    assert all(kind.is_kind(part) for part in parts.values())
    dtypes = {name: str(part.dtype) for name, part in parts.items()}
    assert dtypes == {
        "output": "bfloat16",
        "losses": "float32",
        "logits": "float32",
        "z": "bfloat16",
        "routing": "uint8",
        "x": "bfloat16",
        "router_input": "bfloat16",
        "gate_weight": "float32",
        "w_up": "bfloat16",
        "w_down": "bfloat16",
    }


def test_inputs_are_left_alone(kind):
    layer = random_layer(BASE, 9, "float32")
    inputs = [kind.array(getattr(layer, n), "float32") for n in ("x", "gate_weight", "w_up", "w_down")]
    d_out = kind.array(layer.grad_output, "float32")
    before = [bits(kind, part) for part in (*inputs, d_out)]
    result = moe_forward(*inputs, BASE)
    saved = [bits(kind, part) for part in result.saved]
    moe_backward(d_out, result.saved, *inputs, BASE)
    assert [bits(kind, part) for part in (*inputs, d_out)] == before
    assert [bits(kind, part) for part in result.saved] == saved


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_may_start_at_any_element(kind, dtype):
    """Slices of larger arrays, not aligned to more than an element."""

    def shifted(array):
        room = kind.array(np.append(0, numbers(kind, array)), dtype)
        return room[1:].reshape(array.shape)

    layer = random_layer(BASE, 33, dtype)
    names = ("x", "gate_weight", "w_up", "w_down", "grad_output")
    aligned = [kind.array(getattr(layer, name), dtype) for name in names]
    outputs = []
    for *inputs, d_out in (aligned, [shifted(part) for part in aligned]):
        result = moe_forward(*inputs, BASE)
        outputs.append((result.output, *moe_backward(d_out, result.saved, *inputs, BASE)))
    for i, (got, want) in enumerate(zip(*outputs, strict=True)):
        if want is not None:
            assert_close(numbers(kind, got), numbers(kind, want), dtype, f"result {i}")


def test_loss_gradient_of_none_is_zeros(kind):
    layer = random_layer(BASE, 9, "float32")
    layer.grad_losses[:] = 0
    _, grads = run_layer(kind, BASE, layer, "float32")
    inputs = [kind.array(getattr(layer, n), "float32") for n in ("x", "gate_weight", "w_up", "w_down")]
    result = moe_forward(*inputs, BASE)
    bare = moe_backward(kind.array(layer.grad_output, "float32"), result.saved, *inputs, BASE)
    assert same_bits(kind, grads, bare)


def test_entropy_has_no_gradient(kind):
    layer = random_layer(BASE, 9, "float32")
    _, grads = run_layer(kind, BASE, layer, "float32")
    layer.grad_losses[2] = 1e6
    _, others = run_layer(kind, BASE, layer, "float32")
    assert same_bits(kind, grads, others)


def test_bool_and_uint8_masks_agree(kind):
    layer = random_layer(BASE, 9, "float32")
    inputs = [kind.array(getattr(layer, n), "float32") for n in ("x", "gate_weight", "w_up", "w_down")]
    results = [
        moe_forward(*inputs, BASE, valid_mask=kind.array(values, dtype))
        for values, dtype in (
            (layer.valid_mask, "bool"),
            (layer.valid_mask, "uint8"),
            (7 * layer.valid_mask, "uint8"),
        )
    ]
    assert not layer.valid_mask.all()
    assert len({bits(kind, result.output) for result in results}) == 1
    assert len({bits(kind, result.losses) for result in results}) == 1


def test_full_batch_shares_nothing_between_tokens(kind):
    """A token's output does not depend on its neighbours."""
    layer = random_layer(BASE, 33, "float64")
    whole, _ = run_layer(kind, BASE, layer, "float64")
    layer.x, layer.grad_output, layer.router_input = (
        part[::-1] for part in (layer.x, layer.grad_output, layer.router_input)
    )
    turned, _ = run_layer(kind, BASE, layer, "float64")
    np.testing.assert_allclose(
        numbers(kind, turned.output)[::-1], numbers(kind, whole.output), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("hidden", "width", "experts", "num_tokens"), [(160, 96, 24, 900), (40, 24, 2, 1700), (2100, 1100, 2, 12)]
)
def test_larger_layer(kind, hidden, width, experts, num_tokens, dtype):
    """Many tokens, experts, rows of an expert, or columns; against the same mathematics in matrices."""
    config = MoEConfig(d_model=hidden, ffn_dim=2 * width, num_experts=experts, top_k=2)
    layer = random_layer(config, num_tokens, dtype)
    result, grads = run_layer(kind, config, layer, dtype)
    _, plan = routing_parts(kind, config, result, dtype)
    idx, weights = numbers(kind, plan.topk_idx), numbers(kind, plan.topk_weights)
    output, dw_up, dw_down = np.zeros(layer.x.shape), np.zeros(layer.w_up.shape), np.zeros(layer.w_down.shape)
    for e in range(experts):
        tokens, slots = np.nonzero(idx == e)
        p, x, d_out = weights[tokens, slots, None], layer.x[tokens], layer.grad_output[tokens]
        z = x @ layer.w_up[e].T
        gate, up = z[:, :width], z[:, width:]
        sigmoid = 1 / (1 + np.exp(-gate))
        a = gate * sigmoid * up
        np.add.at(output, tokens, p * (a @ layer.w_down[e].T))
        da = p * (d_out @ layer.w_down[e])
        dz = np.hstack([da * up * sigmoid * (1 + gate * (1 - sigmoid)), da * gate * sigmoid])
        dw_up[e], dw_down[e] = dz.T @ x, d_out.T @ (p * a)
    for name, got, want in (
        ("output", result.output, output),
        ("gradient of w_up", grads.w_up, dw_up),
        ("gradient of w_down", grads.w_down, dw_down),
    ):
        assert_close(numbers(kind, got), want, dtype, name)
