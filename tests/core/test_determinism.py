"""The same bits every run, at any thread count, whatever memory held before."""

from dataclasses import replace

import numpy as np
import pytest

from ffmoe_core import MoEConfig, get_num_threads, make_plan, set_num_threads
from ffmoe_core.backend import STAGES
from ffmoe_core.config import ACTIVATIONS
from tests.core.checks import call_stage, routing_parts, run_layer
from tests.support import DTYPES, NumpyKind, bits, random_layer, router_dtype, same_bits

CONFIG = MoEConfig(
    d_model=72,
    ffn_dim=96,
    num_experts=7,
    top_k=3,
    max_tokens_per_expert=90,
    drop_policy="probs",
    aux_loss_coeff=0.01,
    z_loss_coeff=0.001,
)
NO_LOSSES = {"aux_loss_coeff": 0.0, "z_loss_coeff": 0.0}  # with which no logits are kept
ALL_INPUTS = ("router_input", "expert_bias", "valid_mask")


def whole_layer(kind, config, dtype, num_tokens=203):
    """Everything one forward and backward gives, but the gaps between the parts of the routing block."""
    result, grads = run_layer(
        kind, config, random_layer(config, num_tokens, dtype), dtype, options=ALL_INPUTS
    )
    counts, plan = routing_parts(kind, config, result, dtype)
    return (result.output, result.losses, *result.saved[:2], counts, *plan, *grads)


@pytest.mark.parametrize("options", [{}, NO_LOSSES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(kind, dtype, options):
    config = replace(CONFIG, **options)
    first = whole_layer(kind, config, dtype)
    for _ in range(3):
        assert same_bits(kind, first, whole_layer(kind, config, dtype))


@pytest.fixture
def thread_count():
    """Sets the thread count; puts it back afterwards."""
    before = get_num_threads()
    yield set_num_threads
    set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_number_of_threads_gives_the_same_bits(thread_count, activation, dtype):
    config = replace(CONFIG, activation=activation)
    results = []
    for threads in (1, 2, 3, 5):
        thread_count(threads)
        assert get_num_threads() == threads
        results.append(whole_layer(NumpyKind(), config, dtype))
    assert all(same_bits(NumpyKind(), results[0], other) for other in results[1:])


@pytest.mark.parametrize("aux_loss_coeff", [0.0, 0.01])
def test_any_number_of_threads_gives_the_same_bits_in_a_large_call(thread_count, aux_loss_coeff):
    """Enough tokens that every stage splits its work."""
    config = MoEConfig(
        d_model=16, ffn_dim=16, num_experts=16, top_k=4, aux_loss_coeff=aux_loss_coeff, z_loss_coeff=0.0
    )
    results = []
    for threads in (1, 2, 3):
        thread_count(threads)
        results.append(whole_layer(NumpyKind(), config, "float32", num_tokens=5003))
    assert all(same_bits(NumpyKind(), results[0], other) for other in results[1:])


@pytest.fixture(params=[0xFF, 0x7B])
def dirty_memory(request, monkeypatch, kind):
    """New arrays hold NaN (or large numbers), so that whoever reads before writing is seen."""
    module, empty = kind.module, kind.module.empty

    def dirty(shape, dtype=float, *args, **kwargs):
        array = empty(shape, dtype, *args, **kwargs)
        array.view(np.uint8)[...] = request.param
        dirty.count += 1
        return array

    dirty.count = 0
    monkeypatch.setattr(module, "empty", dirty)
    return dirty


@pytest.mark.parametrize("options", [{}, NO_LOSSES, {"recompute_activations": True, **NO_LOSSES}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_memory_held_before_does_not_matter(kind, dirty_memory, dtype, options, monkeypatch):
    config = replace(CONFIG, **options)
    got = whole_layer(kind, config, dtype)
    assert dirty_memory.count > 10
    monkeypatch.undo()
    assert same_bits(kind, got, whole_layer(kind, config, dtype))


def stage_calls(kind, dtype):
    """stage -> (arguments before the outputs, shapes and dtypes of the outputs, arguments after).

    The plan drops pairs, leaves an expert empty, and has rows that belong to nobody.
    """
    rng = np.random.default_rng(0)
    T, K, E, H, width = 21, 2, 5, 13, 7
    R, W = T * K, router_dtype(dtype)
    config = MoEConfig(
        d_model=H, ffn_dim=2 * width, num_experts=E, top_k=K, aux_loss_coeff=0.1, z_loss_coeff=0.1
    )

    def floats(*shape, dtype=dtype):
        return kind.array(rng.standard_normal(shape), dtype)

    idx = np.array([rng.permutation(E - 1)[:K] for _ in range(T)])
    idx[3] = -1
    idx, weights = kind.array(idx, "int32"), kind.array(rng.random((T, K)), W)
    plan = make_plan(idx, weights, E, capacity=8)
    logits, counts = floats(T, E, dtype=W), kind.array([9, 9, 11, 11, 0], "int32")
    offsets, row_token, token_rows = plan.expert_offsets, plan.row_token, plan.token_rows
    up, down = floats(E, 2 * width, H), floats(E, H, width)
    P, D, S = 3, 2, 2  # ranks, how many of them a token goes to at most, its slots
    ranks = kind.full((T, D), 77, "int32")
    call_stage(kind, "dispatch_ranks", idx, token_rows, E, P, ranks)
    sending = make_plan(ranks, kind.full((T, D), 0, W), P)
    return {
        "gate_logits": ([floats(T, H), floats(E, H)], [((T, E), W)], []),
        "route": (
            [config, logits, None, None],
            [((T, K), "int32"), ((T, K), W), ((E,), "int32"), ((3,), W), ((E + 2,), "float64")],
            [],
        ),
        "route_and_sort": (
            [config, logits, None, None, 8],
            [
                *[((T, K), "int32"), ((T, K), W), ((E,), "int32"), ((3,), W), ((E + 2,), "float64")],
                *[((E + 1,), "int32"), ((R,), "int32"), ((R,), W), ((T, K), "int32")],
            ],
            [],
        ),
        "router_losses": ([config, floats(E + 2, dtype="float64"), counts], [((3,), W)], []),
        "route_backward": (
            [config, logits, idx, weights, counts, token_rows, floats(R, dtype=W), floats(3, dtype=W)],
            [((T, E), W)],
            [],
        ),
        "gate_backward": (
            [floats(T, K, dtype=W), floats(T, H), floats(E, H), floats(R, H), token_rows],
            [((T, H), dtype), ((E, H), dtype)],
            [idx],
        ),
        "sort": (
            [idx, weights, 8, "position"],
            [((E + 1,), "int32"), ((R,), "int32"), ((R,), W), ((T, K), "int32")],
            [],
        ),
        "permute": ([floats(T, H), row_token, offsets], [((R, H), dtype)], []),
        "combine": ([floats(R, H), token_rows, weights], [((T, H), dtype)], []),
        "fill": ([], [((R,), W)], [0.5]),
        "dispatch_ranks": ([idx, token_rows, E, P], [((T, D), "int32")], []),
        "dispatch_slots": (
            [idx, weights, token_rows, offsets, ranks, sending.token_rows, sending.expert_offsets],
            [((T * D, S), "int32"), ((T * D, S), W), ((T, K), "int32"), ((P, 2), "int32")],
            [],
        ),
        "grouped_gemm": ([floats(T, H), up, offsets, row_token, True], [((R, 2 * width), dtype)], []),
        "grouped_gemm_wgrad": (
            [floats(T, H), floats(R, width), offsets, row_token, None],
            [((E, H, width), dtype)],
            [False],
        ),
        "grouped_glu": (
            [floats(T, H), up, offsets, row_token, "swiglu"],
            [((R, 2 * width), dtype), ((R, width), dtype)],
            [],
        ),
        "grouped_glu_backward": (
            [floats(T, H), down, offsets, row_token, plan.row_weights, floats(R, 2 * width), "swiglu"],
            [((R, 2 * width), dtype), ((R, width), dtype), ((R,), W)],
            [],
        ),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_every_element_of_its_outputs(kind, stage, dtype):
    """What the outputs held before shows nowhere in them, and the inputs stay as they were."""
    before, outputs, after = stage_calls(kind, dtype)[stage]
    inputs = [bits(kind, part) for part in before if kind.is_kind(part)]
    results = []
    for filler in (99, 55):
        arrays = [kind.full(shape, filler, dtype) for shape, dtype in outputs]
        call_stage(kind, stage, *before, *arrays, *after)
        results.append([bits(kind, array) for array in arrays])
        assert not any((kind.host(array) == filler).any() for array in arrays)
    assert results[0] == results[1]
    assert inputs == [bits(kind, part) for part in before if kind.is_kind(part)]
