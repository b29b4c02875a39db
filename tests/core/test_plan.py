"""Who goes where: the stable sort, capacity, permute and combine."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffmoe_core import RoutingPlan, combine, make_plan, permute, routing_layout, unpack_routing
from tests import reference
from tests.core.checks import call_stage, check_plan
from tests.support import DTYPES, numbers, rounded, router_dtype


def plan_of(kind, topk_idx, topk_weights, num_experts, *, dtype="float32", **options):
    return make_plan(kind.array(topk_idx, "int32"), kind.array(topk_weights, dtype), num_experts, **options)


def in_numbers(kind, plan):
    return RoutingPlan(*(numbers(kind, part) for part in plan))


@st.composite
def pairs(draw):
    """topk_idx (some -1), topk_weights (with ties), and the number of experts."""
    T, K, E = draw(st.integers(0, 30)), draw(st.integers(1, 5)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    low = draw(st.sampled_from([-1, 0]))
    return rng.integers(low, E, (T, K)), rng.integers(0, 4, (T, K)) / 4, E


@given(
    case=pairs(),
    capacity=st.sampled_from([None, 0, 1, 2, 5, 1000]),
    drop_policy=st.sampled_from(["position", "probs"]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_plan_matches_the_reference(kind, case, capacity, drop_policy, dtype):
    topk_idx, topk_weights, E = case
    plan = plan_of(kind, topk_idx, topk_weights, E, dtype=dtype, capacity=capacity, drop_policy=drop_policy)
    assert all(kind.is_kind(part) for part in plan)
    for name in ("expert_offsets", "row_token", "token_rows"):
        assert kind.host(getattr(plan, name)).dtype == np.int32
    assert kind.host(plan.row_weights).dtype == dtype
    kept = reference.keep(topk_idx, topk_weights, E, capacity, drop_policy)
    check_plan(in_numbers(kind, plan), kept, E)


@pytest.mark.parametrize("drop_policy", ["position", "probs"])
@pytest.mark.parametrize("capacity", [None, 300])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), [(30011, 3, 64), (4099, 8, 1024), (70001, 1, 2)]
)
def test_many_rows(kind, num_tokens, top_k, num_experts, capacity, drop_policy):
    """More rows than any block or thread takes at once, skewed over the experts, with ties of weights."""
    rng = np.random.default_rng(num_tokens)
    idx = (num_experts * rng.random((num_tokens, top_k)) ** 3).astype(np.int64)
    weights = rng.integers(1, 200, idx.shape) / 256
    plan = in_numbers(
        kind, plan_of(kind, idx, weights, num_experts, capacity=capacity, drop_policy=drop_policy)
    )

    flat, flat_weights, place = idx.ravel(), weights.ravel(), np.arange(idx.size)
    heavy_first = np.lexsort((place, -flat_weights if drop_policy == "probs" else place, flat))
    starts = np.searchsorted(flat[heavy_first], np.arange(num_experts))
    rank = np.empty(idx.size, dtype=np.int64)
    rank[heavy_first] = place - starts[flat[heavy_first]]
    kept = rank < (idx.size if capacity is None else capacity)
    order = np.flatnonzero(kept)[np.argsort(flat[kept], kind="stable")]
    rows = np.full(idx.size, -1)
    rows[order] = np.arange(order.size)
    tail = idx.size - order.size
    assert (capacity is None) == (tail == 0)
    assert plan.expert_offsets.tolist() == [0, *np.cumsum(np.bincount(flat[kept], minlength=num_experts))]
    assert (plan.token_rows.ravel() == rows).all()
    assert (plan.row_token == np.r_[order // top_k, np.zeros(tail)]).all()
    assert (plan.row_weights == np.r_[flat_weights[order], np.zeros(tail)]).all()


def test_nan_weights_drop_something_and_stay_in_bounds(kind):
    """Heaviest-first over weights that cannot be compared: any rows, but each once and within the bound."""
    idx = np.arange(40).reshape(20, 2) % 3
    weights = np.where(np.arange(40).reshape(20, 2) % 5 < 3, np.nan, 0.5)
    plan = in_numbers(kind, plan_of(kind, idx, weights, 3, capacity=4, drop_policy="probs"))
    assert plan.expert_offsets.tolist() == [0, 4, 8, 12]
    assert sorted(plan.token_rows[plan.token_rows >= 0]) == list(range(12))


def test_plan_keeps_the_callers_arrays(kind):
    idx, weights = kind.array([[0, 1]], "int32"), kind.array([[0.5, 0.5]], "float32")
    plan = make_plan(idx, weights, 2)
    assert plan.topk_idx is idx
    assert plan.topk_weights is weights


@st.composite
def rows_of_a_plan(draw):
    """A plan's arguments and a width; rows some of which are dropped."""
    topk_idx, topk_weights, E = draw(pairs())
    return (
        topk_idx,
        topk_weights,
        E,
        draw(st.sampled_from([None, 2])),
        draw(st.sampled_from([1, 3, 8, 33, 130, 600])),
    )


@given(case=rows_of_a_plan(), dtype=st.sampled_from(DTYPES), given_out=st.booleans(), seed=st.integers(0, 9))
def test_permute_copies(kind, case, dtype, given_out, seed):
    topk_idx, topk_weights, E, capacity, width = case
    plan = plan_of(kind, topk_idx, topk_weights, E, capacity=capacity)
    x = rounded(np.random.default_rng(seed).standard_normal((len(topk_idx), width)), dtype)
    out = kind.full((topk_idx.size, width), np.nan, dtype) if given_out else None
    got = permute(kind.array(x, dtype), plan, out=out)
    assert (got is out) if given_out else kind.is_kind(got)
    assert kind.host(got).dtype == kind.array(0, dtype).dtype
    numeric = in_numbers(kind, plan)
    want = reference.permute(x, numeric.row_token, numeric.expert_offsets)
    assert numbers(kind, got).tolist() == want.tolist()


@given(
    case=rows_of_a_plan(),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    given_out=st.booleans(),
    seed=st.integers(0, 9),
)
def test_combine_sums_exactly(kind, case, dtype, weighted, given_out, seed):
    """Small whole numbers and dyadic weights: sums without any rounding but the result's."""
    topk_idx, topk_weights, E, capacity, width = case
    plan = plan_of(kind, topk_idx, topk_weights, E, capacity=capacity, dtype=router_dtype(dtype))
    rows = np.random.default_rng(seed).integers(-200, 201, (topk_idx.size, width)).astype(float)
    out = kind.full((len(topk_idx), width), np.nan, dtype) if given_out else None
    got = combine(kind.array(rows, dtype), plan, weighted=weighted, out=out)
    assert (got is out) if given_out else kind.is_kind(got)
    want = reference.combine(rows, numbers(kind, plan.token_rows), topk_weights if weighted else None)
    assert numbers(kind, got).tolist() == rounded(want, dtype).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top_k", "width"), [(1, 24), (2, 13), (3, 600), (8, 40), (1, 1)])
def test_combine_adds_to_what_is_given(kind, dtype, top_k, width):
    """Rounded once, with it."""
    rng = np.random.default_rng(top_k)
    rows, added = (rng.integers(-200, 201, (count, width)).astype(float) / 8 for count in (9, 7))
    token_rows = rng.integers(-1, 9, (7, top_k))
    token_rows[3] = -1
    want = added + np.where((token_rows >= 0)[:, :, None], rows[token_rows], 0).sum(axis=1)
    out = kind.full((7, width), np.nan, dtype)
    given = [kind.array(rows, dtype), kind.array(token_rows, "int32"), None, out, kind.array(added, dtype)]
    call_stage(kind, "combine", *given)
    assert numbers(kind, out).tolist() == rounded(want, dtype).tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_combine_accumulates_in_float32(kind, dtype):
    """Added one by one in 16 bits the small rows would vanish beside the large one."""
    K = 64
    plan = plan_of(kind, np.arange(K)[None], np.ones((1, K)), K)
    rows = np.full((K, 5), 1.0)
    rows[0] = 4096.0
    got = combine(kind.array(rows, dtype), plan)
    assert numbers(kind, got).tolist() == rounded(np.full((1, 5), 4096.0 + K - 1), dtype).tolist()


def test_permute_then_combine_gives_the_tokens_back(kind):
    rng = np.random.default_rng(3)
    idx = np.array([rng.permutation(6)[:2] for _ in range(50)])
    plan = plan_of(kind, idx, np.full((50, 2), 0.5), 6)
    x = kind.array(rng.standard_normal((50, 24)), "float32")
    assert (numbers(kind, combine(permute(x, plan), plan)) == numbers(kind, x)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_packed_block(kind, dtype):
    """Fields of the packed block: aligned, without gaps, in the caller's kind, views of the same memory."""
    T, K, E = 7, 3, 5
    layout = routing_layout(T, K, E, dtype)
    size = {"int32": 4, dtype: 8 if dtype == "float64" else 4}
    spans = sorted(
        (field.offset, field.offset + int(np.prod(field.shape)) * size[field.dtype])
        for field in layout.fields.values()
    )
    assert spans[0][0] == 0
    assert all(field.offset % size[field.dtype] == 0 for field in layout.fields.values())
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1] == (layout.fields["tokens_per_expert"].offset, layout.nbytes)
    block = kind.full((layout.nbytes,), 0, "uint8")
    counts, plan = unpack_routing(block, T, K, E, dtype)
    shapes = {"tokens_per_expert": counts.shape} | {name: part.shape for name, part in plan._asdict().items()}
    assert shapes == {
        "tokens_per_expert": (E,),
        "expert_offsets": (E + 1,),
        "topk_idx": (T, K),
        "token_rows": (T, K),
        "row_token": (T * K,),
        "topk_weights": (T, K),
        "row_weights": (T * K,),
    }
    for i, part in enumerate((counts, *plan)):
        part[...] = i + 1
    for i, part in enumerate((counts, *plan)):
        assert (numbers(kind, part) == i + 1).all()
    assert numbers(kind, block).any()
