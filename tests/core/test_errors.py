"""Every mistake of a user is refused by its own error, whose message names the argument and the value."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import ffmoe_core
from ffmoe_core import (
    MoEConfig,
    MoESaved,
    RoutingPlan,
    combine,
    errors,
    grouped_gemm,
    grouped_gemm_wgrad,
    make_plan,
    moe_backward,
    moe_forward,
    permute,
    route,
    set_num_threads,
    unpack_routing,
)
from tests.core.checks import run_layer
from tests.support import NumpyKind, bits, numbers, random_layer

GOOD = {"d_model": 8, "ffn_dim": 12, "num_experts": 4, "top_k": 2}
CONFIG = MoEConfig(**GOOD)
T, H, WIDTH, E = 5, 8, 6, 4


def refused(error, *words):
    """A context that wants this error, with all the words in its message."""
    return pytest.raises(error, match="".join(rf"(?=[\s\S]*{word})" for word in words))


def label(value):
    """A short name of a parameter for pytest's listing."""
    return getattr(value, "__name__", str(value)[:60])


# --- options ---

BAD_OPTIONS = [
    ({"d_model": 0}, ["d_model=0", "at least 1"]),
    ({"d_model": -3}, ["d_model=-3"]),
    ({"d_model": 8.0}, ["d_model=8.0", "int"]),
    ({"d_model": "8"}, ["d_model='8'", "int"]),
    ({"ffn_dim": 0}, ["ffn_dim=0", "at least 2"]),
    ({"ffn_dim": 7}, ["ffn_dim=7", "odd"]),
    ({"num_experts": 0}, ["num_experts=0", "at least 1"]),
    ({"num_experts": 1025}, ["num_experts=1025", "1024"]),
    ({"num_experts": True}, ["num_experts=True", "int"]),
    ({"top_k": 0}, ["top_k=0", "at least 1"]),
    ({"top_k": 5}, ["top_k=5", "num_experts=4"]),
    ({"top_k": 1.5}, ["top_k=1.5", "int"]),
    ({"activation": "relu"}, ["activation='relu'", "swiglu", "geglu", "relu_squared"]),
    ({"activation": None}, ["activation=None", "swiglu"]),
    ({"gating": "argmax"}, ["gating='argmax'", "softmax", "sigmoid"]),
    ({"drop_policy": "random"}, ["drop_policy='random'", "position", "probs"]),
    ({"routed_scaling_factor": float("nan")}, ["routed_scaling_factor=nan", "finite"]),
    ({"routed_scaling_factor": "2"}, ["routed_scaling_factor='2'"]),
    ({"aux_loss_coeff": -0.1}, ["aux_loss_coeff=-0.1", "at least 0"]),
    ({"aux_loss_coeff": float("inf")}, ["aux_loss_coeff=inf", "finite"]),
    ({"z_loss_coeff": -1}, ["z_loss_coeff=-1", "at least 0"]),
    ({"capacity_factor": 0.0}, ["capacity_factor=0.0", "above 0"]),
    ({"capacity_factor": -1.0}, ["capacity_factor=-1.0"]),
    ({"capacity_factor": "1"}, ["capacity_factor='1'"]),
    ({"max_tokens_per_expert": 0}, ["max_tokens_per_expert=0", "at least 1"]),
    ({"max_tokens_per_expert": 2.5}, ["max_tokens_per_expert=2.5", "int"]),
    ({"max_tokens_per_expert": 10**20}, ["max_tokens_per_expert=1000", "at most 2147483647"]),
    ({"d_model": 2**31}, ["d_model=2147483648", "at most 2147483647"]),
    ({"routed_scaling_factor": 10**400}, ["routed_scaling_factor=1000", "finite"]),
    ({"norm_topk_prob": "False"}, ["norm_topk_prob='False'", "True or False"]),
    ({"allow_dropped_tokens": 0}, ["allow_dropped_tokens=0", "True or False"]),
    ({"recompute_activations": None}, ["recompute_activations=None", "True or False"]),
    ({"num_expert_groups": 2}, ["num_expert_groups=2", "topk_groups=None"]),
    ({"topk_groups": 2}, ["num_expert_groups=None", "topk_groups=2"]),
    ({"num_expert_groups": 3, "topk_groups": 2}, ["num_expert_groups=3", "divide", "num_experts=4"]),
    ({"num_expert_groups": 0, "topk_groups": 1}, ["num_expert_groups=0"]),
    ({"num_expert_groups": 8, "topk_groups": 1}, ["num_expert_groups=8", "num_experts=4"]),
    ({"num_expert_groups": 2, "topk_groups": 3}, ["topk_groups=3", "num_expert_groups=2"]),
    ({"num_expert_groups": 2, "topk_groups": 0}, ["topk_groups=0"]),
    ({"num_expert_groups": 4, "topk_groups": 1}, ["top_k=2", "1 expert", "topk_groups=1"]),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=label)
def test_options(options, words):
    with refused(errors.ConfigError, *words):
        MoEConfig(**{**GOOD, **options})


@pytest.mark.parametrize("missing", GOOD)
def test_sizes_must_be_given(missing):
    with pytest.raises(TypeError, match=missing):
        MoEConfig(**{name: value for name, value in GOOD.items() if name != missing})


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 1024, "top_k": 1024},
        {"d_model": 1, "ffn_dim": 2, "num_experts": 1, "top_k": 1},
        {"num_expert_groups": 2, "topk_groups": 1},
        {"num_expert_groups": 4, "topk_groups": 2},
        {"capacity_factor": 1, "max_tokens_per_expert": 1},
    ],
)
def test_options_at_their_limits_are_fine(options):
    config = MoEConfig(**{**GOOD, **options})
    assert all(getattr(config, name) == value for name, value in options.items())


def test_a_capacity_beyond_all_rows_bounds_nothing():
    assert MoEConfig(**GOOD, capacity_factor=1e308).capacity(5) == 10


def test_a_config_cannot_be_changed_behind_its_checks():
    with pytest.raises(AttributeError):
        CONFIG.top_k = 99
    with refused(errors.ConfigError, "ffn_dim=3"):
        replace(CONFIG, ffn_dim=3)


# --- arrays of a layer ---


def layer_arrays(kind):
    """Keyword arguments of moe_forward that fit."""
    layer = random_layer(CONFIG, T, "float32")
    names = ("x", "gate_weight", "w_up", "w_down", "router_input", "expert_bias")
    arrays = {name: kind.array(getattr(layer, name), "float32") for name in names}
    arrays["valid_mask"] = kind.array(layer.valid_mask, "bool")
    arrays["out"] = kind.full((T, H), 0, "float32")
    return arrays


SHAPES = {
    "x": (T, H),
    "gate_weight": (E, H),
    "w_up": (E, 2 * WIDTH, H),
    "w_down": (E, H, WIDTH),
    "router_input": (T, H),
    "expert_bias": (E,),
    "valid_mask": (T,),
    "out": (T, H),
}
BAD_SHAPES = [
    (name, shape)
    for name, good in SHAPES.items()
    for shape in (
        good[:-1],
        (1, *good),
        *((*good[:i], good[i] + 1, *good[i + 1 :]) for i in range(len(good)) if name != "x" or i),
    )
]


@pytest.mark.parametrize(("name", "shape"), BAD_SHAPES, ids=label)
def test_wrong_rank_or_width(kind, name, shape):
    arrays = layer_arrays(kind)
    arrays[name] = kind.full(shape, 0, "bool" if name == "valid_mask" else "float32")
    with refused(errors.ShapeError, rf"^{name}\b", rf"\({', '.join(map(str, shape))},?\)"):
        moe_forward(**arrays, config=CONFIG)


def test_more_dimensions_than_any_array_has(kind):
    with refused(errors.ShapeError, "^x", "6 dimensions"):
        moe_forward(**{**layer_arrays(kind), "x": kind.full((1,) * 6, 0, "float32")}, config=CONFIG)


BAD_DTYPES = [
    ("x", "int32"),
    ("x", "uint8"),
    ("x", "int64"),
    ("x", "complex64"),
    ("x", "int16"),
    ("gate_weight", "float64"),
    ("gate_weight", "bfloat16"),
    ("w_up", "float64"),
    ("w_up", "int32"),
    ("w_down", "float16"),
    ("router_input", "float64"),
    ("expert_bias", "float64"),
    ("expert_bias", "bfloat16"),
    ("valid_mask", "int32"),
    ("valid_mask", "float32"),
    ("out", "bfloat16"),
]


@pytest.mark.parametrize(("name", "dtype"), BAD_DTYPES)
def test_wrong_dtype(kind, name, dtype):
    arrays = layer_arrays(kind)
    arrays[name] = kind.full(SHAPES[name], 0, dtype)
    with refused(errors.DTypeError, rf"^{name}\b", dtype):
        moe_forward(**arrays, config=CONFIG)


def test_float64_bias_of_a_float64_layer_is_float32_too(kind):
    layer = random_layer(CONFIG, T, "float64")
    arrays = {
        name: kind.array(getattr(layer, name), "float64") for name in ("x", "gate_weight", "w_up", "w_down")
    }
    with refused(errors.DTypeError, "^expert_bias", "float64", "float32"):
        moe_forward(**arrays, config=CONFIG, expert_bias=kind.full((E,), 0, "float64"))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_gate_of_another_dtype(kind, dtype):
    """A float64 layer's gate is float64; others may have a float32 gate, or one of their own dtype."""
    layer = random_layer(CONFIG, T, dtype)
    arrays = {
        name: kind.array(getattr(layer, name), dtype) for name in ("x", "gate_weight", "w_up", "w_down")
    }
    for wrong in {"float64": ["float32"], "bfloat16": ["float16", "float64"], "float16": ["bfloat16"]}[dtype]:
        with refused(errors.DTypeError, "^gate_weight", wrong):
            moe_forward(**{**arrays, "gate_weight": kind.array(layer.gate_weight, wrong)}, config=CONFIG)


@pytest.mark.parametrize("name", ["x", "gate_weight", "w_up", "w_down", "router_input", "out"])
def test_not_contiguous(kind, name):
    arrays = layer_arrays(kind)
    shape = SHAPES[name]
    arrays[name] = kind.full((*shape[:-1], 2 * shape[-1]), 0, "float32")[..., ::2]
    assert arrays[name].shape == shape
    with refused(errors.LayoutError, rf"^{name}\b", "contiguous"):
        moe_forward(**arrays, config=CONFIG)
    arrays[name] = kind.full((shape[-1], *shape[:-1]), 0, "float32")
    arrays[name] = kind.module.moveaxis(arrays[name], 0, -1)
    with refused(errors.LayoutError, rf"^{name}\b", "contiguous"):
        moe_forward(**arrays, config=CONFIG)


@pytest.mark.parametrize("name", ["x", "w_up", "out"])
def test_not_aligned(name):
    arrays = layer_arrays(NumpyKind())
    good = arrays[name]
    arrays[name] = np.frombuffer(bytearray(good.nbytes + 1), np.float32, good.size, offset=1).reshape(
        good.shape
    )
    with refused(errors.LayoutError, rf"^{name}\b", "align"):
        moe_forward(**arrays, config=CONFIG)


def test_foreign_byte_order():
    arrays = layer_arrays(NumpyKind())
    with refused(errors.DTypeError, "^x", ">f4"):
        moe_forward(**{**arrays, "x": arrays["x"].astype(">f4")}, config=CONFIG)


def test_read_only_out():
    arrays = layer_arrays(NumpyKind())
    arrays["out"].flags.writeable = False
    with refused(errors.LayoutError, "^out", "read-only"):
        moe_forward(**arrays, config=CONFIG)


class OnlyDLPack:
    """An array that says nothing of itself but through DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_read_only_out_through_dlpack():
    values = np.zeros((3, 4), "float32")
    values.flags.writeable = False
    plan = make_plan(np.array([[0], [1], [0]], "int32"), np.ones((3, 1), "float32"), 2)
    with refused(errors.LayoutError, "^out", "read-only"):
        permute(np.ones((3, 4), "float32"), plan, out=OnlyDLPack(values))
    assert (values == 0).all()


@pytest.mark.parametrize("value", [[[0.0] * H] * T, 3.0, "x", None], ids=label)
def test_no_array_at_all(kind, value):
    arrays = layer_arrays(kind)
    for name in ("x", "w_up"):
        with refused(errors.DTypeError, rf"^{name}\b", type(value).__name__):
            moe_forward(**{**arrays, name: value}, config=CONFIG)


def test_no_config(kind):
    arrays = layer_arrays(kind)
    for call in (
        lambda: moe_forward(**arrays, config=GOOD),
        lambda: route(arrays["x"], arrays["gate_weight"], None),
    ):
        with refused(errors.ConfigError, "^config=", "MoEConfig"):
            call()


def test_too_many_rows_for_32_bit_indices():
    """Refused before anything of that size is touched: the tokens here take no memory."""
    config = MoEConfig(d_model=1, ffn_dim=2, num_experts=1024, top_k=1024)
    x = np.zeros((1 << 21, 1), np.float16)
    with refused(errors.ShapeError, "2097152 tokens", "top_k=1024"):
        route(x, np.zeros((1024, 1), np.float16), config)


# --- backward ---

BAD_SAVED = [
    ("logits", ((T, E + 1), "float32"), errors.ShapeError),
    ("logits", ((T + 1, E), "float32"), errors.ShapeError),
    ("logits", ((T, E), "float64"), errors.DTypeError),
    ("z", ((2 * T, WIDTH), "float32"), errors.ShapeError),
    ("z", ((2 * T + 1, 2 * WIDTH), "float32"), errors.ShapeError),
    ("z", ((2 * T, 2 * WIDTH), "bfloat16"), errors.DTypeError),
    ("routing", ((16,), "uint8"), errors.ShapeError),
    ("routing", ((5, 5), "uint8"), errors.ShapeError),
]


@pytest.mark.parametrize(("name", "what", "error"), BAD_SAVED, ids=label)
def test_wrong_saved(kind, name, what, error):
    arrays = layer_arrays(kind)
    inputs = [arrays[n] for n in ("x", "gate_weight", "w_up", "w_down")]
    config = replace(CONFIG, z_loss_coeff=0.1)  # which takes logits
    saved = moe_forward(*inputs, config).saved
    with refused(error, rf"^saved\.{name}\b"):
        moe_backward(arrays["x"], saved._replace(**{name: kind.full(what[0], 0, what[1])}), *inputs, config)


def test_backward_with_losses_that_forward_had_not(kind):
    arrays = layer_arrays(kind)
    inputs = [arrays[n] for n in ("x", "gate_weight", "w_up", "w_down")]
    saved = moe_forward(*inputs, CONFIG).saved
    with refused(errors.DTypeError, r"^saved\.logits", "None"):
        moe_backward(arrays["x"], saved, *inputs, replace(CONFIG, aux_loss_coeff=0.1))


@pytest.mark.parametrize(
    ("name", "what", "error"),
    [
        ("grad_output", ((T, H + 1), "float32"), errors.ShapeError),
        ("grad_output", ((T + 1, H), "float32"), errors.ShapeError),
        ("grad_output", ((T, H), "float64"), errors.DTypeError),
        ("grad_losses", ((2,), "float32"), errors.ShapeError),
        ("grad_losses", ((3,), "float64"), errors.DTypeError),
        ("w_up_grad", ((E, WIDTH, H), "float32"), errors.ShapeError),
        ("w_up_grad", ((E, 2 * WIDTH, H), "float64"), errors.DTypeError),
        ("w_down_grad", ((E, WIDTH, H), "float32"), errors.ShapeError),
        ("w_down_grad", ((E, H, WIDTH), "bfloat16"), errors.DTypeError),
    ],
    ids=label,
)
def test_wrong_gradient(kind, name, what, error):
    arrays = layer_arrays(kind)
    inputs = [arrays[n] for n in ("x", "gate_weight", "w_up", "w_down")]
    saved = moe_forward(*inputs, CONFIG).saved
    given = {"grad_output": arrays["x"], name: kind.full(what[0], 0, what[1])}
    with refused(error, rf"^{name}\b"):
        moe_backward(given.pop("grad_output"), saved, *inputs, CONFIG, **given)


def test_backward_of_other_tokens(kind):
    arrays = layer_arrays(kind)
    inputs = [arrays[n] for n in ("x", "gate_weight", "w_up", "w_down")]
    saved = moe_forward(*inputs, CONFIG).saved
    more = kind.full((T + 1, H), 0, "float32")
    with refused(errors.ShapeError, r"^saved\.routing"):
        moe_backward(more, saved, more, *inputs[1:], CONFIG)
    assert isinstance(saved, MoESaved)


def test_backward_of_a_call_whose_arrays_are_as_large():
    """Twice the tokens with half the experts each; on a GPU the plan's numbers can't be looked at without waiting."""
    kind, other = NumpyKind(), replace(CONFIG, top_k=1)
    arrays = layer_arrays(kind)
    weights = [arrays[name] for name in ("gate_weight", "w_up", "w_down")]
    saved = moe_forward(kind.full((2 * T, H), 1, "float32"), *weights, other).saved
    with refused(errors.RoutingError, r"^saved\.routing", f"{T} tokens"):
        moe_backward(arrays["x"], saved, arrays["x"], *weights, CONFIG)
    wild = saved._replace(routing=np.full_like(saved.routing, 77))
    with refused(errors.RoutingError, r"^saved\.routing"):
        moe_backward(arrays["x"], wild, arrays["x"], *weights, CONFIG)


def test_saved_that_is_something_else(kind):
    arrays = layer_arrays(kind)
    inputs = [arrays[n] for n in ("x", "gate_weight", "w_up", "w_down")]
    result = moe_forward(*inputs, CONFIG)
    for wrong in (result, result.saved._asdict(), result.routing):
        with refused(errors.ConfigError, "^saved is a", type(wrong).__name__, "MoESaved"):
            moe_backward(arrays["x"], wrong, *inputs, CONFIG)


def test_outputs_of_a_layer_that_are_its_inputs(kind):
    arrays = layer_arrays(kind)
    del arrays["out"]
    for name in ("x", "router_input"):
        with refused(errors.LayoutError, f"^out overlaps {name}"):
            moe_forward(**arrays, config=CONFIG, out=arrays[name])
    with refused(errors.LayoutError, "^out overlaps w_down"):
        moe_forward(**arrays, config=CONFIG, out=arrays["w_down"].reshape(-1, H)[:T])
    inputs = [arrays[n] for n in ("x", "gate_weight", "w_up", "w_down")]
    saved = moe_forward(*inputs, CONFIG).saved
    sums = kind.full((2 * E, 2 * WIDTH, H), 0, "float32")
    for given, words in (
        ({"w_up_grad": arrays["w_up"]}, "^w_up_grad overlaps w_up"),
        ({"w_down_grad": arrays["w_down"]}, "^w_down_grad overlaps w_down"),
        (
            {
                "w_up_grad": sums[:E],
                "w_down_grad": sums.reshape(-1)[8:][: E * H * WIDTH].reshape(E, H, WIDTH),
            },
            "^w_up_grad overlaps w_down_grad",
        ),
    ):
        with refused(errors.LayoutError, words):
            moe_backward(arrays["x"], saved, *inputs, CONFIG, **given)


# --- stages ---


def test_indices_from_outside(kind):
    weights = kind.full((2, 2), 0.5, "float32")
    for values, wrong in (
        ([[0, 1], [4, 2]], 4),
        ([[0, 1], [-2, 2]], -2),
        ([[0, 1], [2**31 - 1, 2]], 2**31 - 1),
    ):
        with refused(errors.RoutingError, "^topk_idx", "1 values?", f"{wrong}"):
            make_plan(kind.array(values, "int32"), weights, 4)
    ignored = make_plan(kind.array([[0, 1], [-1, 2]], "int32"), weights, 4)
    assert numbers(kind, ignored.token_rows).tolist() == [[0, 1], [-1, 2]]


def test_unchecked_indices_from_outside_go_nowhere(kind):
    """Without the check an index that is no expert is a pair that is dropped, never memory out of bounds."""
    idx = kind.array([[0, 5], [-7, 2**31 - 1]], "int32")
    plan = make_plan(idx, kind.full((2, 2), 0.5, "float32"), 4, validate=False)
    assert numbers(kind, plan.token_rows).tolist() == [[0, -1], [-1, -1]]
    assert numbers(kind, plan.expert_offsets).tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"topk_idx": ((6,), "int32")}, errors.ShapeError, ["^topk_idx"]),
        ({"topk_idx": ((3, 2), "int64")}, errors.DTypeError, ["^topk_idx", "int64", "int32"]),
        ({"topk_idx": ((3, 0), "int32")}, errors.ShapeError, ["^topk_idx", "at least 1"]),
        ({"topk_weights": ((3, 3), "float32")}, errors.ShapeError, ["^topk_weights"]),
        ({"topk_weights": ((3, 2), "float16")}, errors.DTypeError, ["^topk_weights", "float16"]),
        ({"num_experts": 0}, errors.ConfigError, ["num_experts=0"]),
        ({"num_experts": 1025}, errors.ConfigError, ["num_experts=1025", "1024"]),
        ({"num_experts": 4.0}, errors.ConfigError, ["num_experts=4.0", "int"]),
        ({"capacity": -1}, errors.ConfigError, ["capacity=-1"]),
        ({"capacity": 1.5}, errors.ConfigError, ["capacity=1.5"]),
        ({"drop_policy": "last"}, errors.ConfigError, ["drop_policy='last'", "position", "probs"]),
    ],
    ids=label,
)
def test_make_plan(kind, arguments, error, words):
    given = {
        "topk_idx": ((3, 2), "int32"),
        "topk_weights": ((3, 2), "float32"),
        "num_experts": 4,
        **arguments,
    }
    given = {
        name: kind.full(value[0], 0, value[1]) if isinstance(value, tuple) else value
        for name, value in given.items()
    }
    with refused(error, *words):
        make_plan(**given)


@pytest.mark.parametrize("product", [grouped_gemm, grouped_gemm_wgrad])
@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([1, 2, 3], ["starts at 1"]),
        ([0, 3, 2], ["never fall"]),
        ([0, 2, 7], ["ends at 7", "number of rows 6"]),
        ([0, 2**31 - 1, -(2**31), -1, 3], ["never fall"]),
    ],
    ids=label,
)
def test_offsets_from_outside(kind, product, offsets, words):
    a = kind.full((6, 3), 1, "float32")
    b = kind.full((len(offsets) - 1, 5, 3), 1, "float32") if product is grouped_gemm else a
    with refused(errors.RoutingError, "^expert_offsets", *words):
        product(a, b, kind.array(offsets, "int32"))


GEMM = {"a": ((6, 3), "float32"), "b": ((2, 5, 3), "float32"), "expert_offsets": ((3,), "int32")}
WGRAD = {"a": ((6, 3), "float32"), "b": ((6, 5), "float32"), "expert_offsets": ((3,), "int32")}


@pytest.mark.parametrize(
    ("product", "name", "what", "error"),
    [
        (grouped_gemm, "a", ((6,), "float32"), errors.ShapeError),
        (grouped_gemm, "a", ((6, 3), "int32"), errors.DTypeError),
        (grouped_gemm, "a", ((6, 0), "float32"), errors.ShapeError),
        (grouped_gemm, "b", ((2, 0, 3), "float32"), errors.ShapeError),
        (grouped_gemm_wgrad, "a", ((6, 0), "float32"), errors.ShapeError),
        (grouped_gemm_wgrad, "b", ((6, 0), "float32"), errors.ShapeError),
        (grouped_gemm, "b", ((2, 5, 4), "float32"), errors.ShapeError),
        (grouped_gemm, "b", ((5, 3), "float32"), errors.ShapeError),
        (grouped_gemm, "b", ((2, 5, 3), "float64"), errors.DTypeError),
        (grouped_gemm, "expert_offsets", ((2,), "int32"), errors.ShapeError),
        (grouped_gemm, "expert_offsets", ((3,), "int64"), errors.DTypeError),
        (grouped_gemm, "row_index", ((6,), "int64"), errors.DTypeError),
        (grouped_gemm, "row_index", ((6, 1), "int32"), errors.ShapeError),
        (grouped_gemm, "out", ((6, 3), "float32"), errors.ShapeError),
        (grouped_gemm, "out", ((6, 5), "float16"), errors.DTypeError),
        (grouped_gemm_wgrad, "a", ((6,), "float32"), errors.ShapeError),
        (grouped_gemm_wgrad, "a", ((5, 3), "float32"), errors.ShapeError),
        (grouped_gemm_wgrad, "b", ((6, 5), "float16"), errors.DTypeError),
        (grouped_gemm_wgrad, "b", ((6, 5, 1), "float32"), errors.ShapeError),
        (grouped_gemm_wgrad, "expert_offsets", ((1,), "int32"), errors.ShapeError),
        (grouped_gemm_wgrad, "expert_offsets", ((3,), "float32"), errors.DTypeError),
        (grouped_gemm_wgrad, "a_index", ((6,), "float32"), errors.DTypeError),
        (grouped_gemm_wgrad, "b_index", ((6, 6), "int32"), errors.ShapeError),
        (grouped_gemm_wgrad, "out", ((2, 5, 3), "float32"), errors.ShapeError),
        (grouped_gemm_wgrad, "out", ((2, 3, 5), "float64"), errors.DTypeError),
        (grouped_gemm_wgrad, "out", ((2, 3, 5), "bfloat16"), errors.DTypeError),
    ],
    ids=label,
)
def test_grouped_products(kind, product, name, what, error):
    given = {**(GEMM if product is grouped_gemm else WGRAD), name: what}
    if what[0] == (6, 0) and product is grouped_gemm:
        given["b"] = ((2, 5, 0), "float32")
    with refused(error, rf"^{name}\b"):
        product(**{key: kind.full(shape, 0, dtype) for key, (shape, dtype) in given.items()})


def test_accumulating_into_nothing(kind):
    given = {key: kind.full(shape, 0, dtype) for key, (shape, dtype) in WGRAD.items()}
    with refused(errors.ConfigError, "accumulate=True needs out="):
        grouped_gemm_wgrad(**given, accumulate=True)


def test_row_indices_from_outside(kind):
    a, offsets = kind.full((6, 3), 1, "float32"), kind.array([0, 1, 2], "int32")
    for wrong in (6, -1):
        index = kind.array([0, wrong], "int32")
        with refused(errors.RoutingError, "^row_index", f"{wrong}"):
            grouped_gemm(a, kind.full((2, 5, 3), 1, "float32"), offsets, row_index=index)
        with refused(errors.RoutingError, "^a_index", f"{wrong}"):
            grouped_gemm_wgrad(a, a, offsets, a_index=index)
        with refused(errors.RoutingError, "^b_index", f"{wrong}"):
            grouped_gemm_wgrad(a, a, offsets, b_index=index)


def good_plan(kind):
    idx = kind.array([[0, 1], [1, 2], [3, 0]], "int32")
    return make_plan(idx, kind.full((3, 2), 0.5, "float32"), 4)


@pytest.mark.parametrize(
    ("name", "what", "error"),
    [
        ("row_token", ((6,), "int64"), errors.DTypeError),
        ("row_token", ((6, 1), "int32"), errors.ShapeError),
        ("row_token", ((5,), "int32"), errors.ShapeError),
        ("expert_offsets", ((5,), "int64"), errors.DTypeError),
        ("expert_offsets", ((0,), "int32"), errors.ShapeError),
        ("token_rows", ((6,), "int32"), errors.ShapeError),
    ],
    ids=label,
)
def test_permute_by_a_plan_that_does_not_fit(kind, name, what, error):
    plan = good_plan(kind)._replace(**{name: kind.full(what[0], 0, what[1])})
    with refused(error, rf"^plan\.{name}\b"):
        permute(kind.full((3, 4), 0, "float32"), plan)


@pytest.mark.parametrize(
    ("name", "what", "error"),
    [
        ("token_rows", ((3, 2), "int64"), errors.DTypeError),
        ("token_rows", ((6,), "int32"), errors.ShapeError),
        ("topk_weights", ((3, 3), "float32"), errors.ShapeError),
        ("topk_weights", ((3, 2), "float64"), errors.DTypeError),
    ],
    ids=label,
)
def test_combine_by_a_plan_that_does_not_fit(kind, name, what, error):
    plan = good_plan(kind)._replace(**{name: kind.full(what[0], 0, what[1])})
    with refused(error, rf"^plan\.{name}\b"):
        combine(kind.full((6, 4), 0, "float32"), plan)


def test_a_plan_with_numbers_from_outside_names_nothing(kind):
    """No memory out of bounds is read or written, whatever the plan says."""
    x = kind.full((3, 8), 1, "float32")
    plan = good_plan(kind)
    wild = kind.array([2**31 - 1, 3, -1, 0, 1, 2], "int32")
    got = numbers(kind, permute(x, plan._replace(row_token=wild)))
    assert got.tolist() == [[0.0] * 8] * 3 + [[1.0] * 8] * 3
    for offsets, rows in (([0, 0, 0, 0, 2**31 - 1], 6), ([0, 0, 0, 0, -5], 0)):
        got = numbers(kind, permute(x, plan._replace(expert_offsets=kind.array(offsets, "int32"))))
        assert got.tolist() == [[1.0] * 8] * rows + [[0.0] * 8] * (6 - rows)
    wild = kind.array([[0, 6], [-2, 1], [2**31 - 1, -(2**31)]], "int32")
    got = numbers(
        kind, combine(kind.full((6, 8), 1, "float32"), plan._replace(token_rows=wild), weighted=False)
    )
    assert got.tolist() == [[1.0] * 8] * 2 + [[0.0] * 8]


def test_an_output_that_is_an_input(kind):
    plan = good_plan(kind)
    memory = kind.full((6, 8), 0, "float32")
    with refused(errors.LayoutError, "^out overlaps x"):
        permute(memory[3:], plan, out=memory)
    with refused(errors.LayoutError, "^out overlaps rows"):
        combine(memory, plan, out=memory[:3])
    square, offsets = kind.full((1, 8, 8), 0, "float32"), kind.array([0, 6], "int32")
    with refused(errors.LayoutError, "^out overlaps a"):
        grouped_gemm(memory, square, offsets, out=memory)
    with refused(errors.LayoutError, "^out overlaps b"):
        grouped_gemm(memory, square, offsets, out=square[0, :6])
    rows, offsets = kind.full((8, 8), 0, "float32"), kind.array([0, 8], "int32")
    with refused(errors.LayoutError, "^out overlaps a"):
        grouped_gemm_wgrad(rows, rows, offsets, out=rows[None])


def test_unpacking_the_routing_of_another_call(kind):
    result, _ = run_layer(kind, CONFIG, random_layer(CONFIG, T, "float32"), "float32")
    with refused(errors.ShapeError, "^routing has shape", "4 tokens with top_k=2 and num_experts=4"):
        unpack_routing(result.routing, 4, 2, 4)


@pytest.mark.parametrize("routing", [None, [1, 2], np.zeros(16, "int8"), np.zeros(16)], ids=label)
def test_unpacking_what_is_no_routing(routing):
    with refused(errors.DTypeError, "^routing is", "uint8"):
        unpack_routing(routing, 4, 2, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int32"])
def test_a_router_dtype_that_is_none(dtype):
    with refused(errors.ConfigError, f"^router_dtype='{dtype}'", "float32", "float64"):
        unpack_routing(np.zeros(16, "uint8"), 4, 2, 4, dtype)


def test_a_plan_that_is_none(kind):
    x = kind.full((3, 4), 0, "float32")
    for wrong in (
        None,
        route(x, kind.full((2, 4), 0, "float32"), MoEConfig(**GOOD | {"d_model": 4, "num_experts": 2})),
    ):
        for stage in (permute, combine):
            with refused(
                errors.ConfigError, f"^plan is a {type(wrong).__name__}", "RoutingPlan", "make_plan"
            ):
                stage(x, wrong)


def test_no_communicator():
    with refused(errors.ConfigError, "^comm is a str", "Communicator"):
        ffmoe_core.ExpertParallel("all", CONFIG)


def test_rows_or_tokens_that_are_not_the_plans(kind):
    plan = good_plan(kind)
    assert isinstance(plan, RoutingPlan)
    with refused(errors.ShapeError, "^x has 4 tokens", "3"):
        permute(kind.full((4, 8), 0, "float32"), plan)
    with refused(errors.ShapeError, "^rows", r"\(5, 8\)"):
        combine(kind.full((5, 8), 0, "float32"), plan)
    with refused(errors.DTypeError, "^x", "int32"):
        permute(kind.full((3, 8), 0, "int32"), plan)
    with refused(errors.ShapeError, "^out", r"\(6, 9\)"):
        permute(kind.full((3, 8), 0, "float32"), plan, out=kind.full((6, 9), 0, "float32"))


# --- numbers that are none ---


@pytest.mark.parametrize("where", ["x", "router_input", "gate_weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_checked_mode_finds_non_finite_gate_inputs(kind, where, value, monkeypatch):
    arrays = layer_arrays(kind)
    if where != "router_input":
        del arrays["router_input"]
    arrays[where][min(3, E - 1), 1] = value
    monkeypatch.setenv("FFMOE_CHECK", "1")
    words = ["NaN", "router_input"] + ([] if where == "gate_weight" else ["token 3", f"1 of {T}"])
    with refused(errors.NonFiniteError, *words):
        moe_forward(**arrays, config=CONFIG)
    if where != "router_input":
        with refused(errors.NonFiniteError, *words):
            route(arrays["x"], arrays["gate_weight"], CONFIG)
    monkeypatch.setenv("FFMOE_CHECK", "0")
    moe_forward(**arrays, config=CONFIG)


def test_checked_mode_is_on_or_off(monkeypatch):
    arrays = layer_arrays(NumpyKind())
    monkeypatch.setenv("FFMOE_CHECK", "true")
    with refused(errors.ConfigError, "^FFMOE_CHECK='true'", "'1'", "'0'"):
        moe_forward(**arrays, config=CONFIG)
    monkeypatch.setenv("FFMOE_CHECK", "")
    moe_forward(**arrays, config=CONFIG)


def test_checked_mode_lets_finite_numbers_pass(kind, monkeypatch):
    arrays = layer_arrays(kind)
    plain = moe_forward(**arrays, config=CONFIG)
    before = bits(kind, plain.output)
    monkeypatch.setenv("FFMOE_CHECK", "1")
    assert bits(kind, moe_forward(**arrays, config=CONFIG).output) == before


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@pytest.mark.parametrize("drop_policy", ["position", "probs"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "gate_weight"])
def test_unchecked_non_finite_numbers_stay_with_their_tokens(kind, where, value, drop_policy, gating):
    """No crash, no hang, no memory out of bounds; tokens whose logits are finite are as without them."""
    config = replace(CONFIG, max_tokens_per_expert=4, drop_policy=drop_policy, gating=gating)
    layer = random_layer(config, T, "float32")
    getattr(layer, where)[2] = value
    result, grads = run_layer(kind, config, layer, "float32")
    _, plan = ffmoe_core.unpack_routing(result.routing, T, 2, E)
    idx, rows = numbers(kind, plan.topk_idx), numbers(kind, plan.token_rows)
    assert ((idx >= 0) & (idx < E)).all()
    assert (np.sort(rows[rows >= 0]) == np.arange(numbers(kind, plan.expert_offsets)[-1])).all()
    assert grads.x.shape == (T, H)
    if where == "x":
        clean = random_layer(config, T, "float32")
        config = replace(config, max_tokens_per_expert=None)
        got = numbers(kind, run_layer(kind, config, layer, "float32")[0].output)
        want = numbers(kind, run_layer(kind, config, clean, "float32")[0].output)
        others = np.arange(T) != 2
        np.testing.assert_allclose(got[others], want[others], rtol=1e-5, atol=1e-6)


# --- bounds, devices, packages, threads ---


def test_overflow_names_the_expert_and_the_counts(kind):
    config = replace(CONFIG, max_tokens_per_expert=3, allow_dropped_tokens=False)
    layer = random_layer(config, 8, "float32")
    layer.expert_bias[:] = [0, 0, 50, 0]
    with refused(errors.CapacityError, "expert 2: 8 rows", "more than 3 rows", "allow_dropped_tokens"):
        run_layer(kind, config, layer, "float32", options=("expert_bias",))
    run_layer(kind, replace(config, max_tokens_per_expert=8), layer, "float32", options=("expert_bias",))
    with refused(errors.CapacityError, "expert 2: 8 rows", "more than 7 rows"):
        run_layer(kind, replace(config, max_tokens_per_expert=7), layer, "float32", options=("expert_bias",))
    factor = replace(config, max_tokens_per_expert=None, capacity_factor=1.0)
    with refused(errors.CapacityError, "expert 2: 8 rows", "more than 4 rows"):
        run_layer(kind, factor, layer, "float32", options=("expert_bias",))


class Elsewhere:
    """An array whose ``__dlpack__`` claims a device of this type."""

    def __init__(self, device_type):
        self.device_type = device_type

    def __dlpack_device__(self):
        return (self.device_type, 0)

    def __dlpack__(self, **kwargs):
        raise AssertionError("nobody may take the memory of a device that is not there")


@pytest.fixture
def uninstall(monkeypatch):
    """Makes a package impossible to import."""

    def make_missing(package):
        class Nowhere:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == package:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.delitem(sys.modules, package, raising=False)
        monkeypatch.setattr(sys, "meta_path", [Nowhere, *sys.meta_path])

    return make_missing


def test_cuda_array_without_cupy(uninstall):
    uninstall("cupy")
    with refused(errors.MissingDependencyError, "CuPy", r"pip install 'ffmoe\[cuda"):
        route(Elsewhere(2), Elsewhere(2), CONFIG)
    with pytest.raises(ImportError):
        route(Elsewhere(2), Elsewhere(2), CONFIG)


@pytest.mark.parametrize("device_type", [10, 8, 13])
def test_device_of_another_maker(device_type):
    with refused(errors.DeviceError, "^x", f"type {device_type}", "CPU", "CUDA"):
        route(Elsewhere(device_type), Elsewhere(device_type), CONFIG)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["gate_weight", "w_up", "w_down", "router_input", "expert_bias", "valid_mask", "out"]
)
def test_arrays_on_different_devices(cupy_kind, name):
    arrays = layer_arrays(cupy_kind)
    arrays[name] = cupy_kind.host(arrays[name])
    with refused(errors.DeviceError, rf"^{name} is on cpu", "x is on cuda:0"):
        moe_forward(**arrays, config=CONFIG)


def test_bfloat16_without_ml_dtypes(uninstall):
    """The arrays of a NumPy caller can only be bfloat16 by ml_dtypes; the message says what to install."""
    x = NumpyKind().full((T, H), 0, "bfloat16")
    up, down = NumpyKind().full((E, 12, H), 0, "bfloat16"), NumpyKind().full((E, H, 6), 0, "bfloat16")
    gate = NumpyKind().full((E, H), 0, "bfloat16")
    uninstall("ml_dtypes")
    with refused(errors.MissingDependencyError, "ml_dtypes", "pip install ml-dtypes"):
        moe_forward(x, gate, up, down, CONFIG)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", None, True])
def test_thread_count(threads):
    before = ffmoe_core.get_num_threads()
    with refused(errors.ConfigError, f"{threads!r}", "thread"):
        set_num_threads(threads)
    assert ffmoe_core.get_num_threads() == before


FORK = """
import os, signal
import numpy as np
import ffmoe_core as core
config = core.MoEConfig(d_model=64, ffn_dim=64, num_experts=4, top_k=2)
rng = np.random.default_rng(0)
arrays = [rng.standard_normal(shape).astype("f") for shape in ((256, 64), (4, 64), (4, 64, 64), (4, 64, 32))]
core.set_num_threads(2)
wanted = core.moe_forward(*arrays, config).output
child = os.fork()
if child == 0:
    signal.alarm(20)  # what waits for ever is ended
    same = np.array_equal(core.moe_forward(*arrays, config).output, wanted)
    os._exit(0 if same and core.get_num_threads() == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert core.get_num_threads() == 2
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_computes():
    """It has none of its parent's OpenMP threads, for which the runtime would wait for ever."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_out_of_memory_leaves_the_layer_usable(monkeypatch):
    config = replace(CONFIG, aux_loss_coeff=0.1)
    kind, layer = NumpyKind(), random_layer(config, T, "float32")
    before, _ = run_layer(kind, config, layer, "float32")
    for fails_at in range(6):  # output, scratch, logits, losses, routing, z
        calls = iter(range(1000))

        def empty(*args, fails_at=fails_at, calls=calls, real=np.empty):
            if next(calls) == fails_at:
                raise MemoryError
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(np, "empty", empty)
            with refused(errors.OutOfMemoryError, "no room"):
                moe_forward(
                    *[
                        kind.array(getattr(layer, n), "float32")
                        for n in ("x", "gate_weight", "w_up", "w_down")
                    ],
                    config,
                )
        after, _ = run_layer(kind, config, layer, "float32")
        assert bits(kind, before.output) == bits(kind, after.output)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.ShapeError, ValueError),
        (errors.DTypeError, TypeError),
        (errors.DeviceError, ValueError),
        (errors.LayoutError, ValueError),
        (errors.RoutingError, ValueError),
        (errors.CapacityError, RuntimeError),
        (errors.NonFiniteError, ValueError),
        (errors.MissingDependencyError, ImportError),
        (errors.KernelError, RuntimeError),
        (errors.OutOfMemoryError, MemoryError),
        (errors.UnsupportedError, NotImplementedError),
    ],
)
def test_errors_are_the_built_in_ones_too(error, builtin):
    assert issubclass(error, builtin)
    assert issubclass(error, errors.FFMoEError)
