"""The stages that say which token goes to which rank, and the losses of sums over ranks."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ffmoe_core import MoEConfig, make_plan
from tests import reference
from tests.core.checks import call_stage
from tests.support import assert_close, bits, numbers


def home_of(num_experts, num_ranks):
    """The rank of every expert, and its number there: runs of experts, the longer ones first."""
    parts = np.array_split(np.arange(num_experts), num_ranks)
    return [(rank, local) for rank, part in enumerate(parts) for local in range(len(part))]


def random_pairs(rng, num_tokens, top_k, num_experts):
    """Distinct experts for every token, some tokens without any, and weights."""
    idx = np.array([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]).reshape(-1, top_k)
    idx[rng.random(num_tokens) < 0.1] = -1
    return idx, rng.random((num_tokens, top_k))


@given(
    num_tokens=st.sampled_from([0, 1, 7, 300]),
    top_k=st.integers(1, 9),
    spare=st.integers(0, 9),
    num_ranks=st.integers(1, 9),
    capacity=st.sampled_from([None, 1, 5]),
    chunks=st.sampled_from([1, 1, 2, 3, 8]),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 99),
)
def test_what_goes_where(kind, num_tokens, top_k, spare, num_ranks, capacity, chunks, dtype, seed):
    rng = np.random.default_rng(seed)
    T, K, P, C, E = num_tokens, top_k, num_ranks, chunks, max(top_k, num_ranks) + spare
    D, S = min(P, K), min(K, -(-E // P))
    idx, weights = random_pairs(rng, T, K, E)
    idx_, weights_ = kind.array(idx, "int32"), kind.array(weights, dtype)
    plan = make_plan(idx_, weights_, E, capacity=capacity)
    kept = numbers(kind, plan.token_rows) >= 0
    home = home_of(E, P)

    ranks = kind.full((T, D), 77, "int32")
    call_stage(kind, "dispatch_ranks", idx_, plan.token_rows, E, P, ranks, C)
    chunk_of = [chunk for chunk in range(C) for _ in range(T * chunk // C, T * (chunk + 1) // C)]
    wanted = [list(dict.fromkeys(chunk_of[t] * P + home[e][0] for e in idx[t][kept[t]])) for t in range(T)]
    assert numbers(kind, ranks).tolist() == [mine + [-1] * (D - len(mine)) for mine in wanted]

    sending = make_plan(ranks, kind.full((T, D), 0, dtype), C * P)
    slot_experts, slot_weights = kind.full((T * D, S), 77, "int32"), kind.full((T * D, S), np.nan, dtype)
    pair_slots, counts = kind.full((T, K), 77, "int32"), kind.full((P, C + 1), 77, "int32")
    call_stage(
        kind, "dispatch_slots", idx_, weights_, plan.token_rows, plan.expert_offsets, ranks, sending.token_rows,
        sending.expert_offsets, slot_experts, slot_weights, pair_slots, counts, C,
    )  # fmt: skip
    want_experts, want_weights = np.full((T * D, S), -1), np.zeros((T * D, S))
    want_slots, want_counts = np.full((T, K), -1), np.zeros((P, C + 1), np.int64)
    row = 0
    for chunk, rank, t in itertools.product(range(C), range(P), range(T)):
        mine = [k for k in range(K) if kept[t, k] and home[idx[t, k]][0] == rank]
        if not mine or chunk_of[t] != chunk:
            continue
        for s, k in enumerate(mine):
            want_experts[row, s], want_weights[row, s] = home[idx[t, k]][1] * C + chunk, weights[t, k]
            want_slots[t, k] = row * S + s
        want_counts[rank, chunk] += 1
        want_counts[rank, C] += len(mine)
        row += 1
    assert numbers(kind, slot_experts).tolist() == want_experts.tolist()
    assert bits(kind, slot_weights) == bits(kind, kind.array(want_weights, dtype))
    assert numbers(kind, pair_slots).tolist() == want_slots.tolist()
    assert numbers(kind, counts).tolist() == want_counts.tolist()


@given(
    tokens=st.lists(st.sampled_from([0, 1, 5, 200]), min_size=1, max_size=4),
    num_experts=st.sampled_from([5, 70, 1000]),
    gating=st.sampled_from(["softmax", "sigmoid"]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_losses_of_added_sums(kind, tokens, num_experts, gating, dtype):
    """Sums and counts of parts of the tokens, added up, give the losses of all."""
    rng, E = np.random.default_rng(0), num_experts
    config = MoEConfig(
        d_model=1, ffn_dim=2, num_experts=E, top_k=2, gating=gating, aux_loss_coeff=0.3, z_loss_coeff=0.2
    )
    sums, counts, logits, idx = np.zeros(E + 2), np.zeros(E), [], []
    for count in tokens:
        part = kind.array(rng.standard_normal((count, E)), dtype)
        chosen, part_counts = kind.full((count, 2), 77, "int32"), kind.full((E,), 77, "int32")
        part_sums = kind.full((E + 2,), np.nan, "float64")
        others = (kind.full((count, 2), 0, dtype), part_counts, kind.full((3,), 0, dtype), part_sums)
        call_stage(kind, "route", config, part, None, None, chosen, *others)
        sums, counts = sums + numbers(kind, part_sums), counts + numbers(kind, part_counts)
        logits.append(numbers(kind, part))
        idx.append(numbers(kind, chosen))
    losses = kind.full((3,), np.nan, dtype)
    call_stage(
        kind, "router_losses", config, kind.array(sums, "float64"), kind.array(counts, "int32"), losses
    )
    logits = np.concatenate(logits)
    valid = np.ones(len(logits), dtype=bool)
    want = reference.router_losses(config, logits, reference.count(np.concatenate(idx), E), valid)
    assert_close(numbers(kind, losses), want, dtype, "losses")
