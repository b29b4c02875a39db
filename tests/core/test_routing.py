"""From tokens to experts: selection, weights, losses, and their gradients."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffmoe_core import MoEConfig, route
from tests import reference
from tests.core.checks import call_stage, check_selection
from tests.support import DTYPES, assert_close, numbers, random_layer, rounded, router_dtype, same_bits


@st.composite
def router_configs(draw, max_experts=12):
    """Any router: experts, groups, gating, weights, losses."""
    group_size = draw(st.integers(1, 4))
    groups = draw(st.integers(1, max(1, max_experts // group_size)))
    experts = group_size * groups
    best = draw(st.integers(1, groups))
    grouped = draw(st.booleans())
    return MoEConfig(
        d_model=draw(st.integers(1, 40)),
        ffn_dim=2,
        num_experts=experts,
        top_k=draw(st.integers(1, best * group_size if grouped else experts)),
        gating=draw(st.sampled_from(["softmax", "sigmoid"])),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        num_expert_groups=groups if grouped else None,
        topk_groups=best if grouped else None,
        aux_loss_coeff=draw(st.sampled_from([0.0, 0.01])),
        z_loss_coeff=draw(st.sampled_from([0.0, 0.001])),
    )


def stage_route(kind, config, logits, dtype="float32", *, expert_bias=None, valid_mask=None):
    """The route stage on given logits: topk_idx, topk_weights, tokens_per_expert, losses (kind's arrays)."""
    T, K, E = len(logits), config.top_k, config.num_experts
    outputs = (
        kind.full((T, K), 77, "int32"),
        kind.full((T, K), np.nan, dtype),
        kind.full((E,), 77, "int32"),
        kind.full((3,), np.nan, dtype),
    )
    call_stage(
        kind,
        "route",
        config,
        kind.array(logits, dtype),
        None if expert_bias is None else kind.array(expert_bias, "float32"),
        None if valid_mask is None else kind.array(valid_mask, "uint8"),
        *outputs,
        None,
    )
    return outputs


@given(
    config=router_configs(),
    num_tokens=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    float32_gate=st.booleans(),
    biased=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_route_matches_the_reference(kind, config, num_tokens, dtype, float32_gate, biased, masked, seed):
    W = router_dtype(dtype)
    gate_dtype = W if float32_gate else dtype
    layer = random_layer(config, num_tokens, dtype, seed=seed, gate_dtype=gate_dtype)
    bias = layer.expert_bias if biased else None
    mask = layer.valid_mask if masked else None
    got = route(
        kind.array(layer.x, dtype),
        kind.array(layer.gate_weight, gate_dtype),
        config,
        expert_bias=None if bias is None else kind.array(bias, "float32"),
        valid_mask=None if mask is None else kind.array(mask, "bool"),
    )
    assert all(kind.is_kind(part) for part in got)
    assert kind.host(got.topk_idx).dtype == np.int32
    assert kind.host(got.tokens_per_expert).dtype == np.int32
    assert all(kind.host(part).dtype == W for part in (got.topk_weights, got.logits, got.losses))
    logits, topk_idx = numbers(kind, got.logits), numbers(kind, got.topk_idx)
    assert_close(logits, layer.x @ layer.gate_weight.T, W, "logits")
    valid = np.ones(num_tokens, dtype=bool) if mask is None else mask
    weights = np.zeros((num_tokens, config.top_k))
    for t in range(num_tokens):
        if valid[t]:
            check_selection(config, logits[t], topk_idx[t], bias, W)
            weights[t] = reference.weigh(config, logits[t], topk_idx[t])
        else:
            assert (topk_idx[t] == -1).all()
    assert_close(numbers(kind, got.topk_weights), weights, W, "weights")
    counts = reference.count(topk_idx, config.num_experts)
    assert numbers(kind, got.tokens_per_expert).tolist() == counts.tolist()
    losses = reference.router_losses(config, logits, counts, valid)
    for i, name in enumerate(("aux loss", "z-loss", "entropy")):
        np.testing.assert_allclose(
            numbers(kind, got.losses)[i],
            losses[i],
            rtol=1e-12 if W == "float64" else 3e-6,
            err_msg=name,
            atol=1e-15 if W == "float64" else 1e-7,  # the entropy of one expert is 0, and sums round
        )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [None, (4, 2), (16, 9), (2, 1)])
@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
def test_ties_go_to_the_lower_index(kind, gating, groups, biased):
    """Logits of three values tie everywhere: experts within groups, and whole groups."""
    G, best = groups or (None, None)
    config = MoEConfig(
        d_model=1, ffn_dim=2, num_experts=16, top_k=8, gating=gating, num_expert_groups=G, topk_groups=best
    )
    rng = np.random.default_rng(5)
    logits = rng.integers(0, 3, (60, 16)).astype(float)
    bias = rng.integers(0, 2, 16).astype(float) if biased else None
    topk_idx = numbers(kind, stage_route(kind, config, logits, expert_bias=bias)[0])
    for t in range(len(logits)):
        assert topk_idx[t].tolist() == reference.select(config, logits[t], bias)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("experts", "top_k"), [(5, 2), (128, 8), (100, 32), (128, 40), (600, 6)])
def test_logits_that_differ_in_their_last_bits(kind, experts, top_k, dtype):
    """All of a token's, or the last that is chosen and the first that is not, in either order, or a tie."""
    config = MoEConfig(d_model=1, ffn_dim=2, num_experts=experts, top_k=top_k)
    rng = np.random.default_rng(experts)
    steps = rng.permuted(np.tile(np.arange(experts), (9, 1)), axis=1)
    spread = rng.standard_normal((30, experts)).astype(dtype)
    ends = np.argsort(-spread, axis=1)[:, top_k - 1 : top_k + 1]
    for row, (last, other) in zip(spread, ends, strict=True):
        row[other] = np.nextafter(row[last], row[last] + rng.integers(-1, 2).astype(dtype))
    logits = np.concatenate([1 + steps * np.finfo(dtype).eps, spread]).astype(float)
    topk_idx = numbers(kind, stage_route(kind, config, logits, dtype)[0])
    assert topk_idx.tolist() == [reference.select(config, row) for row in logits]


@pytest.mark.parametrize(
    ("experts", "top_k"), [(1, 1), (2, 2), (31, 31), (33, 5), (64, 64), (257, 3), (1024, 8)]
)
def test_any_number_of_experts(kind, experts, top_k):
    config = MoEConfig(d_model=1, ffn_dim=2, num_experts=experts, top_k=top_k, z_loss_coeff=1.0)
    rng = np.random.default_rng(experts)
    logits = np.float32(rng.standard_normal((9, experts))).astype(float)
    idx, weights, counts, losses = (numbers(kind, part) for part in stage_route(kind, config, logits))
    assert idx.tolist() == [reference.select(config, row) for row in logits]
    want = [reference.weigh(config, row, chosen) for row, chosen in zip(logits, idx, strict=True)]
    assert_close(weights, np.array(want), "float32", "weights")
    assert counts.tolist() == reference.count(idx, experts).tolist()
    want = reference.router_losses(config, logits, counts, [True] * 9)
    np.testing.assert_allclose(losses, want, rtol=3e-6, atol=1e-7)


def test_every_expert_of_1024_can_be_chosen(kind):
    config = MoEConfig(d_model=1, ffn_dim=2, num_experts=1024, top_k=1024)
    order = np.random.default_rng(0).permutation(1024)
    idx, weights, *_ = (numbers(kind, part) for part in stage_route(kind, config, order[None] / 64.0))
    assert idx[0].tolist() == np.argsort(-order).tolist()
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_expert_groups": 4, "topk_groups": 2}])
@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
def test_non_finite_logits_still_choose_real_experts(kind, gating, options, biased):
    config = MoEConfig(d_model=1, ffn_dim=2, num_experts=8, top_k=4, gating=gating, **options)
    nan, inf = np.nan, np.inf
    logits = np.array(
        [
            [nan] * 8,
            [inf] * 8,
            [-inf] * 8,
            [nan, inf, -inf, 0, nan, inf, -inf, 0],
            [nan, nan, nan, nan, nan, nan, nan, 1],
            [-inf, -inf, -inf, -inf, -inf, -inf, nan, nan],
            [0, 1, 2, 3, 4, 5, 6, 7],
        ]
    )
    bias = np.zeros(8) if biased else None
    idx, _, counts, _ = (numbers(kind, part) for part in stage_route(kind, config, logits, expert_bias=bias))
    assert ((idx >= 0) & (idx < 8)).all()
    assert all(len(set(row)) == 4 for row in idx)
    assert counts.tolist() == reference.count(idx, 8).tolist()
    assert idx[6].tolist() == [7, 6, 5, 4]
    if not options and not biased:  # NaN ranks as -inf, and ties go to the lower index
        assert idx.tolist()[:6] == [
            [0, 1, 2, 3],
            [0, 1, 2, 3],
            [0, 1, 2, 3],
            [1, 5, 3, 7],
            [7, 0, 1, 2],
            [0, 1, 2, 3],
        ]


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shift", [-300.0, -90.0, 90.0, 3000.0])
def test_large_logits_neither_overflow_nor_vanish(kind, gating, shift):
    """Weights and losses of scores that float32 cannot hold are still right, and so are the gradients."""
    config = MoEConfig(
        d_model=1,
        ffn_dim=2,
        num_experts=6,
        top_k=3,
        gating=gating,
        aux_loss_coeff=1.0,
        z_loss_coeff=1.0,
    )
    rng = np.random.default_rng(0)
    logits = np.float32(rng.standard_normal((5, 6)) + shift).astype(float)
    idx, weights, counts, losses = outputs = [
        numbers(kind, part) for part in stage_route(kind, config, logits)
    ]
    want = np.array([reference.weigh(config, row, i) for row, i in zip(logits, idx, strict=True)])
    assert_close(weights, want, "float32", "weights")
    wanted = reference.router_losses(config, logits, counts, [True] * 5)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    grad_losses = np.array([0.5, 2.0, 9.0])
    got, want = route_backward(kind, config, logits, outputs, grad_losses, rng)
    assert_close(got, want, "float32", "gradient of the logits")
    if gating == "softmax":
        config = replace(config, aux_loss_coeff=0.0, z_loss_coeff=0.0)
        got, want = route_backward(kind, config, logits, outputs, None, rng, with_logits=False)
        assert_close(got, want, "float32", "gradient of the logits by the weights alone")


@pytest.mark.parametrize(("capacity", "drop_policy"), [(-1, "position"), (40, "position"), (40, "probs")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [
        (0, 4, 2),
        (1, 128, 8),
        (1, 1024, 1),
        (3, 33, 31),
        (31, 600, 32),
        (64, 128, 8),
        (65, 128, 8),
        (128, 60, 8),
        (128, 1000, 1),
        (129, 8, 7),
        (333, 250, 3),
        (2500, 24, 6),
        (700, 1000, 40),
    ],
)
@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
def test_route_and_sort_do_what_both_do(
    kind, gating, num_tokens, num_experts, top_k, dtype, capacity, drop_policy
):
    """Few tokens and many, on both sides of where the work is spread differently: the same bits."""
    rng = np.random.default_rng(num_tokens)
    config = MoEConfig(
        d_model=1, ffn_dim=2, num_experts=num_experts, top_k=top_k, drop_policy=drop_policy, gating=gating,
        aux_loss_coeff=0.01, z_loss_coeff=0.001,
    )  # fmt: skip
    logits = kind.array(rng.standard_normal((num_tokens, num_experts)), dtype)
    valid = kind.array(rng.random(num_tokens) < 0.9, "uint8")
    slots = num_tokens * top_k

    def outputs():
        pairs = (num_tokens, top_k)
        routed = [
            (pairs, "int32"),
            (pairs, dtype),
            (num_experts, "int32"),
            (3, dtype),
            (num_experts + 2, "float64"),
        ]
        plan = [(num_experts + 1, "int32"), (slots, "int32"), (slots, dtype), (pairs, "int32")]
        return [kind.full(shape, 99, dtype) for shape, dtype in routed + plan]

    together, apart = outputs(), outputs()
    call_stage(kind, "route_and_sort", config, logits, None, valid, capacity, *together)
    call_stage(kind, "route", config, logits, None, valid, *apart[:5])
    call_stage(kind, "sort", apart[0], apart[1], capacity, drop_policy, *apart[5:])
    assert same_bits(kind, together, apart)
    idx, counts = numbers(kind, apart[0]), numbers(kind, apart[2])
    assert (counts == np.bincount(idx[idx >= 0], minlength=num_experts)).all()
    # without losses, the few can be done at once
    config = replace(config, aux_loss_coeff=0.0, z_loss_coeff=0.0)
    at_once = outputs()
    call_stage(
        kind, "route_and_sort", config, logits, None, valid, capacity, *at_once[:4], None, *at_once[5:]
    )
    assert same_bits(kind, at_once[:3] + at_once[5:], together[:3] + together[5:])
    alone = outputs()
    call_stage(kind, "route", config, logits, None, valid, *alone[:4], None)
    assert same_bits(kind, alone[:3], together[:3])
    entropy = numbers(kind, together[3])[2]
    for losses in (alone[3], at_once[3]):
        rtol = 1e-12 if dtype == "float64" else 3e-6
        np.testing.assert_allclose(numbers(kind, losses), [0, 0, entropy], rtol=rtol)


@pytest.mark.parametrize("float32_gate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "width", "num_experts"),
    [
        (300, 1032, 136),
        (1, 2056, 131),
        (40, 2056, 8),
        (250, 264, 24),
        (2600, 40, 24),
        (67, 130, 5),
        (300, 136, 60),
        (8257, 264, 40),
        (8257, 136, 60),
    ],
)
def test_products_are_exact_to_the_rounding(kind, num_tokens, width, num_experts, dtype, float32_gate):
    """Long and short contractions, several tiles and parts of them, widths that divide by 8, by 4 or by neither."""
    W = router_dtype(dtype)
    gate_dtype = W if float32_gate else dtype
    rng = np.random.default_rng(0)

    def normal(*shape, dtype):
        return rounded(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 1, shape[-1]), dtype)

    def check(got, want, dtype, what):
        got = numbers(kind, got)
        assert_close(got, want, dtype, what)
        if dtype == "float32":  # 16 bits of an operand would pass the general bound
            assert np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want), what

    x, rows = (normal(count, width, dtype=dtype) for count in (num_tokens, 2 * num_tokens))
    token_rows = rng.integers(-1, len(rows), (num_tokens, 5))
    gathered = np.where((token_rows >= 0)[:, :, None], rows[token_rows], 0).sum(axis=1)
    gate = normal(num_experts, width, dtype=gate_dtype)
    d_logits = normal(num_tokens, num_experts, dtype=W)
    inputs = [kind.array(x, dtype), kind.array(gate, gate_dtype)]
    logits = kind.full((num_tokens, num_experts), np.nan, W)
    call_stage(kind, "gate_logits", *inputs, logits)
    check(logits, x @ gate.T, W, "logits")
    added = (kind.array(rows, dtype), kind.array(token_rows, "int32"))
    for pieces, sums in (((None, None), 0), (added, gathered)):
        dx = kind.full(x.shape, np.nan, dtype)
        d_gate = kind.full(gate.shape, np.nan, gate_dtype)
        call_stage(kind, "gate_backward", kind.array(d_logits, W), *inputs, *pieces, dx, d_gate)
        check(dx, d_logits @ gate + sums, dtype, "dx")
        check(d_gate, d_logits.T @ x, gate_dtype, "d_gate_weight")
        # one at a time: the same bits
        dx_alone = kind.full(x.shape, np.nan, dtype)
        d_gate_alone = kind.full(gate.shape, np.nan, gate_dtype)
        logits_grad = kind.array(d_logits, W)
        call_stage(kind, "gate_backward", logits_grad, *inputs, *pieces, dx_alone, None)
        call_stage(kind, "gate_backward", logits_grad, *inputs, None, None, None, d_gate_alone)
        assert same_bits(kind, (dx_alone, d_gate_alone), (dx, d_gate))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_experts", [40, 60, 136])
@pytest.mark.parametrize("num_tokens", [8257, 16385, 24500, 40000])
def test_logits_of_many_tokens(kind, num_tokens, num_experts, dtype):
    """On Hopper a tile is one, two or three warpgroups high, and a block has several."""
    rng = np.random.default_rng(0)
    x, gate = (rounded(rng.standard_normal((rows, 200)), dtype) for rows in (num_tokens, num_experts))
    logits = kind.full((num_tokens, num_experts), np.nan, "float32")
    call_stage(kind, "gate_logits", kind.array(x, dtype), kind.array(gate, dtype), logits)
    want = x @ gate.T
    wrong = np.linalg.norm(numbers(kind, logits) - want, axis=1)
    assert (wrong < 1e-6 * np.linalg.norm(want, axis=1)).all()


@pytest.mark.parametrize("float32_gate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "width", "num_experts", "top_k", "rows_a_token"),
    [
        (300, 1032, 136, 8, 8),
        (700, 264, 40, 10, 2),  # as of ranks that send a row each
        (33, 40, 24, 3, 3),
        (5, 2056, 1024, 6, 11),
        (1000, 520, 8, 8, 1),
        (67, 130, 5, 2, 2),
        (1, 8, 1, 1, 1),
        (0, 8, 4, 2, 2),
        (300, 136, 60, 4, 4),
        (8257, 264, 40, 5, 5),
        (8257, 136, 60, 4, 4),
    ],
)
def test_gradients_of_chosen_experts_alone(
    kind, num_tokens, width, num_experts, top_k, rows_a_token, dtype, float32_gate
):
    """The same as of all experts, most of them zero; some pairs are no expert's, and some slots no row's."""
    W = router_dtype(dtype)
    gate_dtype = W if float32_gate else dtype
    rng = np.random.default_rng(0)
    x, gate = (
        rounded(rng.standard_normal((count, width)), of)
        for count, of in ((num_tokens, dtype), (num_experts, gate_dtype))
    )
    rows = rounded(rng.standard_normal((2 * num_tokens, width)), dtype)
    token_rows = rng.integers(-1, max(len(rows), 1), (num_tokens, rows_a_token))
    idx = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k]
    d_chosen = rounded(rng.standard_normal(idx.shape), W)
    idx[::7], d_chosen[::7] = -1, 0  # left out
    d_logits = spread(d_chosen, idx, num_experts)
    arrays = [kind.array(part, of) for part, of in ((d_chosen, W), (x, dtype), (gate, gate_dtype))]
    added = [kind.array(rows, dtype), kind.array(token_rows, "int32")]
    chosen = kind.array(idx, "int32")
    sums = np.zeros(x.shape)
    for t, j in zip(*np.nonzero(token_rows >= 0), strict=True):
        sums[t] += rows[token_rows[t, j]]
    for pieces, whole in ((added, d_logits @ gate + sums), ([None, None], d_logits @ gate)):
        dx = kind.full(x.shape, np.nan, dtype)
        d_gate = kind.full(gate.shape, np.nan, gate_dtype)
        call_stage(kind, "gate_backward", *arrays, *pieces, dx, d_gate, chosen)
        for got, want, of in ((dx, whole, dtype), (d_gate, d_logits.T @ x, gate_dtype)):
            assert_close(numbers(kind, got), want, of, "gradient")
            if of == "float32":
                assert np.linalg.norm(numbers(kind, got) - want) <= 1e-6 * np.linalg.norm(want)


def route_backward(
    kind,
    config,
    logits,
    outputs,
    grad_losses,
    rng,
    valid=None,
    kept=None,
    dtype="float32",
    *,
    with_logits=True,
):
    """The gradient of the logits from the stage, which may have to do without them, and from the reference."""
    idx, weights, counts, _ = outputs
    T, K = idx.shape
    valid = np.ones(T, dtype=bool) if valid is None else valid
    kept = reference.keep(idx, weights, config.num_experts) if kept is None else kept
    token_rows = reference.sort(idx, weights, config.num_experts, kept).token_rows
    # among more rows than there are pairs: such as slots that were sent, not all of them in use
    token_rows = np.where(kept, 2 * token_rows + 1, -1)
    dp_rows = np.full(2 * T * K, np.nan)
    dp_rows[1::2] = np.asarray(rng.standard_normal(T * K), dtype=dtype)
    d_logits = kind.full(idx.shape if config.sparse_gradient else logits.shape, np.nan, dtype)
    call_stage(
        kind,
        "route_backward",
        config,
        kind.array(logits, dtype) if with_logits else None,
        kind.array(idx, "int32"),
        kind.array(weights, dtype),
        kind.array(counts, "int32"),
        kind.array(token_rows, "int32"),
        kind.array(dp_rows, dtype),
        None if grad_losses is None else kind.array(grad_losses, dtype),
        d_logits,
    )
    want = np.zeros(logits.shape)
    if valid.any():
        want = reference.router_losses_backward(
            config, logits, counts, valid, np.zeros(3) if grad_losses is None else grad_losses
        )
    for t in range(T):
        if valid[t]:
            dp = np.where(kept[t], dp_rows[token_rows[t]], 0)
            want[t] += reference.weigh_backward(config, logits[t], idx[t], dp)
    got = numbers(kind, d_logits)
    return spread(got, idx, config.num_experts) if config.sparse_gradient else got, want


def spread(chosen, idx, num_experts):
    """[T, E] from the chosen experts' [T, K]: zeros elsewhere."""
    whole = np.zeros((len(idx), num_experts))
    for t, k in zip(*np.nonzero(idx >= 0), strict=True):
        whole[t, idx[t, k]] = chosen[t, k]
    assert (chosen[idx < 0] == 0).all()
    return whole


@given(
    config=router_configs(),
    num_tokens=st.integers(0, 20),
    dtype=st.sampled_from(["float32", "float64"]),
    masked=st.booleans(),
    limit=st.sampled_from([None, 2]),
    with_losses=st.booleans(),
    spare_logits=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradient_of_the_logits(
    kind, config, num_tokens, dtype, masked, limit, with_losses, spare_logits, seed
):
    rng = np.random.default_rng(seed)
    logits = np.asarray(2 * rng.standard_normal((num_tokens, config.num_experts)), dtype=dtype).astype(float)
    valid = rng.random(num_tokens) < 0.7 if masked else np.ones(num_tokens, dtype=bool)
    outputs = [numbers(kind, part) for part in stage_route(kind, config, logits, dtype, valid_mask=valid)]
    kept = reference.keep(outputs[0], outputs[1], config.num_experts, limit)
    grad_losses = np.array([30.0, -200.0, 1e6]) if with_losses else None
    got, want = route_backward(
        kind,
        config,
        logits,
        outputs,
        grad_losses,
        rng,
        valid,
        kept,
        dtype,
        with_logits=config.keeps_logits or spare_logits,
    )
    assert (got[~valid] == 0).all()
    # where one expert is all there is, gradients cancel to rounding noise of terms of size 1
    bound = 1e-12 if dtype == "float64" else 5e-6
    most = bound * max(np.max(np.abs(want), initial=0), 1)
    assert np.max(np.abs(got - want), initial=0) <= most


@pytest.mark.parametrize(
    ("gating", "normalised", "z_loss_coeff"),
    [
        ("softmax", True, 0.0),
        ("softmax", True, 1.0),
        ("softmax", False, 0.0),
        ("sigmoid", True, 0.0),
        ("sigmoid", False, 0.0),
        ("sigmoid", False, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(300, 128, 8), (4500, 20, 3), (70, 300, 40)]
)
@pytest.mark.parametrize("scale", [0.3, 0.0])
def test_gradient_of_many_logits(
    kind, scale, num_tokens, num_experts, top_k, dtype, gating, normalised, z_loss_coeff
):
    """More slots than lanes of a warp, more tokens than warps; pairs dropped, tokens left out."""
    config = MoEConfig(
        d_model=1,
        ffn_dim=2,
        num_experts=num_experts,
        top_k=top_k,
        routed_scaling_factor=scale,
        gating=gating,
        norm_topk_prob=normalised,
        z_loss_coeff=z_loss_coeff,
    )
    rng = np.random.default_rng(0)
    logits = np.float32(2 * rng.standard_normal((num_tokens, num_experts))).astype(float)
    valid = rng.random(num_tokens) < 0.9
    outputs = [numbers(kind, part) for part in stage_route(kind, config, logits, dtype, valid_mask=valid)]
    kept = (outputs[0] >= 0) & (rng.random(outputs[0].shape) < 0.9)
    grad_losses = np.array([0.0, 1.0, 0.0]) if z_loss_coeff else None
    got, want = route_backward(kind, config, logits, outputs, grad_losses, rng, valid, kept, dtype)
    assert want.any() == (scale != 0 or z_loss_coeff != 0)
    assert_close(got, want, dtype, "gradient of the logits")


def test_gradient_of_a_loss_over_more_rows_than_an_int_holds(kind):
    """As of many ranks, whose rows tokens_per_expert counts."""
    T, E, K, grad = 3, 5, 2, 1e9
    config = MoEConfig(d_model=1, ffn_dim=2, num_experts=E, top_k=K, aux_loss_coeff=1.0)
    logits = np.random.default_rng(0).standard_normal((T, E))
    counts = np.array([2**30, 2**30, 2**29, 2**30, 2**31 - 2])
    d_logits = kind.full((T, E), np.nan, "float64")
    call_stage(
        kind,
        "route_backward",
        config,
        kind.array(logits, "float64"),
        kind.array(np.tile([1, 3], (T, 1)), "int32"),
        kind.full((T, K), 0.5, "float64"),
        kind.array(counts, "int32"),
        kind.full((T, K), -1, "int32"),
        kind.full((1, 1), np.nan, "float64"),
        kind.array([grad, 0, 0], "float64"),
        d_logits,
    )
    valid = counts.sum() / K
    q = np.array([reference.softmax(row) for row in logits])
    d_q = grad * E / valid * counts / valid
    want = q * (d_q - (q @ d_q)[:, None])
    assert_close(numbers(kind, d_logits), want, "float64", "gradient of the logits")


def test_no_valid_token_is_no_loss(kind):
    config = MoEConfig(d_model=1, ffn_dim=2, num_experts=4, top_k=2, aux_loss_coeff=1.0, z_loss_coeff=1.0)
    for logits in (np.ones((3, 4)), np.ones((0, 4))):
        outputs = [
            numbers(kind, part)
            for part in stage_route(kind, config, logits, valid_mask=np.zeros(len(logits)))
        ]
        assert (outputs[0] == -1).all()
        for part in outputs[1:]:
            assert (part == 0).all()
        got, _ = route_backward(
            kind, config, logits, outputs, np.ones(3), np.random.default_rng(0), np.zeros(len(logits), bool)
        )
        assert (got == 0).all()


def test_many_tokens(kind):
    """More tokens than any block or thread takes at once: counts and losses are still of all of them."""
    config = MoEConfig(d_model=1, ffn_dim=2, num_experts=16, top_k=4, aux_loss_coeff=1.0, z_loss_coeff=1.0)
    rng = np.random.default_rng(1)
    logits = np.float32(rng.standard_normal((20011, 16)) + np.linspace(0, 2, 16)).astype(float)
    mask = rng.random(20011) < 0.9
    idx, weights, counts, losses = (
        numbers(kind, part) for part in stage_route(kind, config, logits, valid_mask=mask)
    )
    order = np.argsort(-logits, axis=1, kind="stable")[:, :4]
    assert (idx[mask] == order[mask]).all()
    assert (idx[~mask] == -1).all()
    assert counts.tolist() == np.bincount(order[mask].ravel(), minlength=16).tolist()
    selected = np.exp(np.take_along_axis(logits, order, 1))
    assert_close(weights, selected / selected.sum(1, keepdims=True) * mask[:, None], "float32", "weights")
    exp = np.exp(logits[mask])
    q = exp / exp.sum(1, keepdims=True)
    want = [
        16 * (counts / mask.sum()) @ q.mean(0),
        np.mean(np.log(exp.sum(1)) ** 2),
        np.mean(-np.sum(q * np.log(q), axis=1)),
    ]
    np.testing.assert_allclose(losses, want, rtol=1e-5)
