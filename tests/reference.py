"""The layer in NumPy float64, one token at a time: what everything else is tested against.

Deliberately plain and slow, and imports nothing of ours. A ``config`` is any object with the options of a
layer as attributes. Gradients are written by hand, token by token; test_reference.py holds them against
finite differences.
"""

import math
from decimal import ROUND_CEILING, Decimal
from types import SimpleNamespace

import numpy as np

# --- scalar functions ---


def sigmoid(v):
    return 1 / (1 + np.exp(-v)) if v >= 0 else np.exp(v) / (1 + np.exp(v))


def logsumexp(v):
    top = np.max(v)
    return top + np.log(np.sum(np.exp(v - top)))


def softmax(v):
    return np.exp(v - logsumexp(v))


def activate(activation, gate):
    """(act(gate), act'(gate)), element by element."""
    if activation == "swiglu":
        s = np.array([sigmoid(v) for v in gate])
        return gate * s, s * (1 + gate * (1 - s))
    if activation == "geglu":
        c = math.sqrt(2 / math.pi)
        t = np.tanh(c * (gate + 0.044715 * gate**3))
        dt = (1 - t**2) * c * (1 + 3 * 0.044715 * gate**2)
        return 0.5 * gate * (1 + t), 0.5 * (1 + t) + 0.5 * gate * dt
    if activation == "relu_squared":
        positive = np.maximum(gate, 0)
        return positive**2, 2 * positive
    raise ValueError(activation)


# --- routing, one token ---


def scores(config, logits):
    """[E]: every expert's score."""
    return softmax(logits) if config.gating == "softmax" else np.array([sigmoid(v) for v in logits])


def choices(config, logits, expert_bias=None):
    """[E]: what experts are ranked by, before groups."""
    if expert_bias is None and config.num_expert_groups is None:
        return np.array(logits, dtype=np.float64)
    return scores(config, logits) + (0 if expert_bias is None else expert_bias)


def group_scores(config, choice):
    """[G]: the sum of each group's two best choices."""
    size = config.num_experts // config.num_expert_groups
    groups = [choice[g * size : (g + 1) * size] for g in range(config.num_expert_groups)]
    return np.array([sum(sorted(group, reverse=True)[:2]) for group in groups])


def best(values, count):
    """Indices of the ``count`` largest, largest first, ties to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def select(config, logits, expert_bias=None):
    """[K]: the experts of one token."""
    choice = choices(config, logits, expert_bias)
    if config.num_expert_groups is not None:
        size = config.num_experts // config.num_expert_groups
        allowed = best(group_scores(config, choice), config.topk_groups)
        choice = [c if e // size in allowed else -math.inf for e, c in enumerate(choice)]
    return best(choice, config.top_k)


def weigh(config, logits, idx):
    """[K]: the weights of the selected experts."""
    if config.gating == "softmax":
        w = softmax(logits[idx]) if config.norm_topk_prob else softmax(logits)[idx]
    else:
        w = scores(config, logits)[idx]
        if config.norm_topk_prob:
            w = w / np.sum(w)
    return w * config.routed_scaling_factor


def weigh_backward(config, logits, idx, d_weights):
    """[E]: gradient of <d_weights, weigh(logits)>."""
    dw = d_weights * config.routed_scaling_factor
    d_logits = np.zeros(len(logits))
    if config.gating == "softmax" and config.norm_topk_prob:
        w = softmax(logits[idx])
        d_logits[idx] = w * (dw - dw @ w)
    elif config.gating == "softmax":
        q = softmax(logits)
        dq = np.zeros(len(logits))
        dq[idx] = dw
        d_logits = q * (dq - dq @ q)
    else:
        s = scores(config, logits)[idx]
        ds = (dw - dw @ s / np.sum(s)) / np.sum(s) if config.norm_topk_prob else dw
        d_logits[idx] = ds * s * (1 - s)
    return d_logits


def normalised_scores(config, logits):
    """[E]: scores that sum to 1, which the aux loss and the entropy are about."""
    s = scores(config, logits)
    return s / np.sum(s)


def router_losses(config, logits, tokens_per_expert, valid):
    """(aux loss, z-loss, mean entropy) over the valid tokens."""
    tokens = [t for t in range(len(logits)) if valid[t]]
    aux = z = entropy = 0.0
    for t in tokens:
        q = normalised_scores(config, logits[t])
        aux += config.num_experts * (tokens_per_expert / len(tokens)) @ q / len(tokens)
        z += logsumexp(logits[t]) ** 2 / len(tokens)
        entropy -= sum(v * math.log(v) for v in q if v > 0) / len(tokens)
    return np.array([config.aux_loss_coeff * aux, config.z_loss_coeff * z, entropy])


def router_losses_backward(config, logits, tokens_per_expert, valid, grad_losses):
    """[T, E]: gradient of aux loss and z-loss; the fractions of rows are constants, entropy has none."""
    n = int(np.sum(valid))
    d_logits = np.zeros(np.shape(logits))
    for t in range(len(logits)):
        if not valid[t]:
            continue
        dq = grad_losses[0] * config.aux_loss_coeff * config.num_experts * tokens_per_expert / n / n
        q = normalised_scores(config, logits[t])
        if config.gating == "softmax":
            d_logits[t] = q * (dq - dq @ q)
        else:
            s = scores(config, logits[t])
            d_logits[t] = (dq - dq @ q) / np.sum(s) * s * (1 - s)
        d_logits[t] += (
            grad_losses[1] * config.z_loss_coeff / n * 2 * logsumexp(logits[t]) * softmax(logits[t])
        )
    return d_logits


# --- who goes where ---


def capacity(config, num_tokens):
    """Most rows an expert takes, or None."""
    bounds = []
    if config.capacity_factor is not None:
        share = Decimal(str(config.capacity_factor)) * num_tokens * config.top_k
        bounds.append(int((share / config.num_experts).to_integral_value(ROUND_CEILING)))
    if config.max_tokens_per_expert is not None:
        bounds.append(config.max_tokens_per_expert)
    return min(bounds) if bounds else None


def count(topk_idx, num_experts):
    """[E]: pairs of each expert."""
    counts = np.zeros(num_experts, dtype=np.int64)
    for e in np.ravel(topk_idx):
        if 0 <= e < num_experts:
            counts[e] += 1
    return counts


def keep(topk_idx, topk_weights, num_experts, limit=None, drop_policy="position"):
    """[T, K] bool: the pairs that stay."""
    kept = np.zeros(topk_idx.shape, dtype=bool)
    for e in range(num_experts):
        pairs = [(t, k) for t, k in np.ndindex(topk_idx.shape) if topk_idx[t, k] == e]
        if drop_policy == "probs":
            pairs.sort(key=lambda pair: (-topk_weights[pair], pair))
        for pair in pairs[:limit]:
            kept[pair] = True
    return kept


def sort(topk_idx, topk_weights, num_experts, kept):
    """expert_offsets [E+1], row_token [R], row_weights [R], token_rows [T, K], as a namespace."""
    rows = topk_idx.size
    offsets = np.zeros(num_experts + 1, dtype=np.int64)
    row_token = np.zeros(rows, dtype=np.int64)
    row_weights = np.zeros(rows)
    token_rows = np.full(topk_idx.shape, -1, dtype=np.int64)
    row = 0
    for e in range(num_experts):
        for t, k in np.ndindex(topk_idx.shape):
            if topk_idx[t, k] == e and kept[t, k]:
                row_token[row], row_weights[row], token_rows[t, k] = t, topk_weights[t, k], row
                row += 1
        offsets[e + 1] = row
    return SimpleNamespace(
        expert_offsets=offsets, row_token=row_token, row_weights=row_weights, token_rows=token_rows
    )


def permute(x, row_token, expert_offsets):
    """[R, H]: the tokens' vectors in row order; rows that belong to nobody are zero."""
    out = np.zeros((len(row_token), x.shape[1]))
    for r in range(expert_offsets[-1]):
        out[r] = x[row_token[r]]
    return out


def combine(rows, token_rows, weights=None):
    """[T, H]: each token's weighted sum over its rows."""
    out = np.zeros((len(token_rows), rows.shape[1]))
    for t, k in np.ndindex(token_rows.shape):
        if token_rows[t, k] >= 0:
            out[t] += (1 if weights is None else weights[t, k]) * rows[token_rows[t, k]]
    return out


# --- grouped products ---


def expert_rows(expert_offsets):
    """Pairs (expert, row), row by row."""
    for e in range(len(expert_offsets) - 1):
        for r in range(expert_offsets[e], expert_offsets[e + 1]):
            yield e, r


def grouped_gemm(a, b, expert_offsets, row_index=None, transpose_b=True, num_rows=None):
    """[R, N]: each row times its expert's matrix."""
    rows = len(a if row_index is None else row_index) if num_rows is None else num_rows
    out = np.zeros((rows, b.shape[1] if transpose_b else b.shape[2]))
    for e, r in expert_rows(expert_offsets):
        source = a[r if row_index is None else row_index[r]]
        out[r] = b[e] @ source if transpose_b else source @ b[e]
    return out


def grouped_gemm_wgrad(a, b, expert_offsets, a_index=None, b_index=None):
    """[E, M, N]: each expert's sum of outer products."""
    out = np.zeros((len(expert_offsets) - 1, a.shape[1], b.shape[1]))
    for e, r in expert_rows(expert_offsets):
        out[e] += np.outer(a[r if a_index is None else a_index[r]], b[r if b_index is None else b_index[r]])
    return out


def grouped_glu(x, w_up, expert_offsets, row_index, activation):
    """z [R, 2I] and a [R, I]."""
    z = grouped_gemm(x, w_up, expert_offsets, row_index)
    width = z.shape[1] // 2
    a = np.zeros((len(z), width))
    for r in range(len(z)):
        a[r] = activate(activation, z[r, :width])[0] * z[r, width:]
    return z, a


def grouped_glu_backward(d_out, w_down, expert_offsets, row_index, row_weights, z, activation):
    """dz [R, 2I], pa [R, I] and dp [R]."""
    width = z.shape[1] // 2
    dz, pa, dp = np.zeros(z.shape), np.zeros((len(z), width)), np.zeros(len(z))
    for e, r in expert_rows(expert_offsets):
        act, slope = activate(activation, z[r, :width])
        up = z[r, width:]
        da = d_out[row_index[r]] @ w_down[e]
        dp[r] = da @ (act * up)
        da = row_weights[r] * da
        dz[r] = np.concatenate([da * up * slope, da * act])
        pa[r] = row_weights[r] * act * up
    return dz, pa, dp


def dense_glu(x, w_up, w_down, d_out, activation):
    """A GLU block that every token visits, and the gradients of <d_out, output>, as a namespace."""
    T, width = len(x), len(w_up) // 2
    z, a, output = np.zeros((T, 2 * width)), np.zeros((T, width)), np.zeros(x.shape)
    dz, dx, dw_up, dw_down = (np.zeros(like.shape) for like in (z, x, w_up, w_down))
    for t in range(T):
        z[t] = w_up @ x[t]
        act, slope = activate(activation, z[t, :width])
        up = z[t, width:]
        a[t] = act * up
        output[t] = w_down @ a[t]
        da = w_down.T @ d_out[t]
        dz[t] = np.concatenate([da * up * slope, da * act])
        dx[t] = w_up.T @ dz[t]
        dw_down += np.outer(d_out[t], a[t])
        dw_up += np.outer(dz[t], x[t])
    return SimpleNamespace(z=z, a=a, output=output, dz=dz, dw_down=dw_down, dx=dx, dw_up=dw_up)


# --- the layer ---


def moe_forward(
    x,
    gate_weight,
    w_up,
    w_down,
    config,
    *,
    router_input=None,
    expert_bias=None,
    valid_mask=None,
    topk_idx=None,
    kept=None,
):
    """Everything the layer computes, as a namespace.

    ``topk_idx`` and ``kept`` (both [T, K]) take the discrete decisions from outside, so that a near-tie
    that rounding decided the other way is no difference; None makes them here.
    """
    T, K, E = len(x), config.top_k, config.num_experts
    routed = x if router_input is None else router_input
    valid = np.ones(T, dtype=bool) if valid_mask is None else np.asarray(valid_mask, dtype=bool)
    logits, weights = np.zeros((T, E)), np.zeros((T, K))
    idx = np.full((T, K), -1, dtype=np.int64)
    for t in range(T):
        logits[t] = gate_weight @ routed[t]
        if valid[t]:
            idx[t] = select(config, logits[t], expert_bias) if topk_idx is None else topk_idx[t]
            weights[t] = weigh(config, logits[t], idx[t])
    tokens_per_expert = count(idx, E)
    if kept is None:
        kept = keep(idx, weights, E, capacity(config, T), config.drop_policy)
    output = np.zeros((T, config.d_model))
    for t, k in np.ndindex(T, K):
        if kept[t, k]:
            z = w_up[idx[t, k]] @ x[t]
            gate, up = z[: len(z) // 2], z[len(z) // 2 :]
            output[t] += weights[t, k] * (w_down[idx[t, k]] @ (activate(config.activation, gate)[0] * up))
    return SimpleNamespace(
        output=output,
        losses=router_losses(config, logits, tokens_per_expert, valid),
        logits=logits,
        topk_idx=idx,
        topk_weights=weights,
        tokens_per_expert=tokens_per_expert,
        kept=kept,
        valid=valid,
    )


def moe_backward(
    grad_output, forward, x, gate_weight, w_up, w_down, config, *, router_input=None, grad_losses=(0, 0, 0)
):
    """Gradients of <grad_output, output> + <grad_losses, losses> (entropy aside), as a namespace.

    ``d.x`` holds the router's part too where ``router_input`` is None.
    """
    T, K = len(x), config.top_k
    routed = x if router_input is None else router_input
    dx, d_routed, d_gate = np.zeros(x.shape), np.zeros(x.shape), np.zeros(gate_weight.shape)
    dw_up, dw_down = np.zeros(w_up.shape), np.zeros(w_down.shape)
    d_logits = router_losses_backward(
        config, forward.logits, forward.tokens_per_expert, forward.valid, grad_losses
    )
    for t in range(T):
        if not forward.valid[t]:
            continue
        dp = np.zeros(K)
        for k in range(K):
            if not forward.kept[t, k]:
                continue
            e, p = forward.topk_idx[t, k], forward.topk_weights[t, k]
            z = w_up[e] @ x[t]
            gate, up = z[: len(z) // 2], z[len(z) // 2 :]
            act, slope = activate(config.activation, gate)
            dp[k] = grad_output[t] @ (w_down[e] @ (act * up))
            da = p * (w_down[e].T @ grad_output[t])
            dz = np.concatenate([da * up * slope, da * act])
            dw_down[e] += np.outer(grad_output[t], p * act * up)
            dw_up[e] += np.outer(dz, x[t])
            dx[t] += w_up[e].T @ dz
        d_logits[t] += weigh_backward(config, forward.logits[t], forward.topk_idx[t], dp)
        d_routed[t] = gate_weight.T @ d_logits[t]
        d_gate += np.outer(d_logits[t], routed[t])
    if router_input is None:
        dx, d_routed = dx + d_routed, None
    return SimpleNamespace(
        x=dx, router_input=d_routed, gate_weight=d_gate, w_up=dw_up, w_down=dw_down, logits=d_logits
    )
