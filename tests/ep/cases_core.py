"""Cases for every rank: a layer spread over the group is the layer of one process."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from ffmoe_core import MoEConfig, ep_exchange
from ffmoe_core.arrays import as_array
from ffmoe_core.comm import LocalCommunicator, Step, all_reduced
from ffmoe_core.comm.host import host_numbers
from ffmoe_core.comm.mpi import MpiCommunicator
from ffmoe_core.cpu.backend import CpuBackend
from ffmoe_core.errors import CapacityError, CommError, ConfigError, DTypeError, ShapeError
from ffmoe_core.expert_parallel import ExpertParallel, expert_range
from tests.ep.single import group_layer, single_process
from tests.support import CupyKind, NumpyKind, assert_close, router_dtype

BASE = MoEConfig(d_model=24, ffn_dim=32, num_experts=7, top_k=3, aux_loss_coeff=0.1, z_loss_coeff=0.01)

OPTIONS = {
    "plain": {},
    "one expert a token": {"top_k": 1},
    "every expert": {"top_k": 7},
    "as many experts as fit evenly": {"num_experts": 12},
    "geglu": {"activation": "geglu"},
    "relu_squared": {"activation": "relu_squared"},
    "sigmoid": {"gating": "sigmoid"},
    "sigmoid as it is": {"gating": "sigmoid", "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "softmax as it is": {"norm_topk_prob": False, "routed_scaling_factor": 0.5},
    "groups": {"num_experts": 8, "num_expert_groups": 4, "topk_groups": 2},
    "capacity factor": {"capacity_factor": 0.75},
    "capacity factor, heaviest": {"capacity_factor": 0.75, "drop_policy": "probs"},
    "hard bound": {"max_tokens_per_expert": 2},
    "recompute": {"recompute_activations": True},
    "no losses": {"aux_loss_coeff": 0.0, "z_loss_coeff": 0.0},
}
INPUTS = {
    "router_input": ("router_input",),
    "expert_bias": ("expert_bias",),
    "valid_mask": ("valid_mask",),
    "all inputs": ("router_input", "expert_bias", "valid_mask"),
}


def uneven(ranks):
    """More tokens on each rank than on the one before."""
    return [5 + 4 * rank for rank in range(ranks)]


def kind_of(comm):
    """The arrays that a communicator exchanges."""
    return CupyKind() if type(comm).__name__ == "NcclCommunicator" else NumpyKind()


def on_host(kind, parts):
    """A named tuple's arrays as NumPy's; the rest of it as it is."""
    return type(parts)(*(kind.host(part) if kind.is_kind(part) else part for part in parts))


def run_group(comm, config, layer, inputs=(), loss_scope="group", save=True, sums=None, ep_chunks=1):
    """This rank's part of the layer, from and to NumPy: (the ExpertParallel, result, gradients)."""
    ep = ExpertParallel(comm, config, layer="layer 0", loss_scope=loss_scope, ep_chunks=ep_chunks)
    cut, own, kind = layer.cuts[comm.rank], slice(ep.experts.start, ep.experts.stop), kind_of(comm)

    def array(values):
        return kind.array(values, values.dtype)

    options = {
        name: array(getattr(layer, name)[cut]) for name in ("router_input", "valid_mask") if name in inputs
    }
    if "expert_bias" in inputs:
        options["expert_bias"] = array(layer.expert_bias)
    arguments = [
        array(part) for part in (layer.x[cut], layer.gate_weight, layer.w_up[own], layer.w_down[own])
    ]
    result = ep.forward(*arguments, save_for_backward=save, **options)
    routed = {"router_input": options["router_input"]} if "router_input" in options else {}
    d_losses = None if layer.grad_losses is None else array(layer.grad_losses)
    buffers = {name: array(values) for name, values in (sums or {}).items()}
    grads = ep.backward(
        array(layer.grad_output[cut]), result, *arguments, grad_losses=d_losses, **routed, **buffers
    )
    if sums is not None:
        assert grads.w_up is None
        assert grads.w_down is None
        grads = grads._replace(w_up=buffers["w_up_grad"], w_down=buffers["w_down_grad"])
    result = on_host(kind, result._replace(dispatched=on_host(kind, result.dispatched)))
    return ep, result, on_host(kind, grads)


def summed(comm, array):
    """The sum of every rank's array, in float64, by way of text: nothing of what is tested."""
    texts = comm.gather(array.astype(np.float64).tobytes().hex(), Step("sum of a test"))
    return sum(np.frombuffer(bytes.fromhex(text)).reshape(array.shape) for text in texts)


def check_group(
    comm, config, tokens, dtype="float64", *, inputs=(), loss_scope="group", seed=0, layer=None, ep_chunks=1
):
    """Output, losses and every gradient of this rank are those of one process."""
    layer = layer or group_layer(config, tokens, dtype, seed=seed)
    W, rank = router_dtype(dtype), comm.rank
    want = single_process(layer, config, inputs, loss_scope, dtype)
    before = dict(comm.sent_bytes)
    ep, result, grads = run_group(comm, config, layer, inputs, loss_scope, ep_chunks=ep_chunks)
    sent = {step: count - before.get(step, 0) for step, count in comm.sent_bytes.items()}
    own = slice(ep.experts.start, ep.experts.stop)
    pairs = sum(tokens) * config.top_k
    near = {"scale": 1.0, "independent": pairs}  # differences of one number a pair, which may cancel

    def close(got, expected, what, dtype=dtype, **options):
        assert_close(got.astype(np.float64), np.asarray(expected, np.float64), dtype, what, **options)

    d_gate = summed(comm, grads.gate_weight)
    close(result.output, want.output[rank], "output")
    close(result.losses, want.losses[rank], "losses", W)
    close(grads.x, want.x[rank], "gradient of x", scale=1.0)
    if grads.router_input is not None:
        close(grads.router_input, want.router_input[rank], "gradient of router_input", **near)
    close(d_gate, want.weights["gate_weight"], "gradient of gate_weight", **near)
    close(grads.w_up, want.weights["w_up"][own], "gradient of w_up")
    close(grads.w_down, want.weights["w_down"][own], "gradient of w_down")
    if loss_scope == "group":
        E = config.num_experts
        assert result.dispatched.balance[E + 1 :].tolist() == want.counts.tolist()
        assert result.dispatched.balance[E] == sum(int(kept.sum()) for kept in want.kept)
    check_sizes(comm, config, want, layer, sent, result.dispatched)


def check_sizes(comm, config, want, layer, sent, dispatched):
    """A token crosses once to each other rank with one of its experts, and the bytes are as many as that says."""
    home = {e: r for r in range(comm.size) for e in expert_range(config.num_experts, comm.size, r)}
    goes = []  # goes[source][rank]
    for idx, kept in zip(want.topk_idx, want.kept, strict=True):
        ranks = [{home[e] for e in idx[t][kept[t]]} for t in range(len(idx))]
        goes.append([sum(rank in mine for mine in ranks) for rank in range(comm.size)])
    me, others = comm.rank, [rank for rank in range(comm.size) if rank != comm.rank]
    sizes = (np.reshape(size, (-1, comm.size)) for size in (dispatched.sizes.sent, dispatched.sizes.received))
    sent_by_chunk, received_by_chunk = sizes
    assert sent_by_chunk.sum(0).tolist() == goes[me]
    assert received_by_chunk.sum(0).tolist() == [row[me] for row in goes]
    out, back = sum(goes[me][r] for r in others), sum(goes[r][me] for r in others)
    slots = min(config.top_k, -(-config.num_experts // comm.size))
    width, number = layer.x.itemsize * config.d_model, layer.grad_losses.itemsize
    assert sent["counts"] == 4 * (len(sent_by_chunk) + 1) * len(others)
    assert sent["dispatch"] == out * (width + slots * (4 + number))
    assert sent["combine"] == back * width
    assert sent["combine backward"] == out * width
    assert sent["weights backward"] == back * slots * number
    assert sent["dispatch backward"] == back * width


CASES = {}


def case(name):
    def register(function):
        CASES[name] = function
        return function

    return register


def workload(name, tokens, dtype="float64", favoured=None, ep_chunks=1, **options):
    """``favoured(ranks)`` are the experts that the bias sends every token to first."""

    def run(comm):
        config = replace(BASE, **options)
        counts = tokens(comm.size)
        layer = group_layer(config, counts, dtype)
        if favoured is not None:
            layer.expert_bias[list(favoured(comm.size))] += 10
        inputs = () if favoured is None else ("expert_bias",)
        check_group(comm, config, counts, dtype, inputs=inputs, layer=layer, ep_chunks=ep_chunks)

    CASES[f"{name}, {dtype}"] = run


for _name, _options in OPTIONS.items():
    for _dtype in ("float64", "float32"):
        for _scope in ("group", "local"):

            def _run(comm, options=_options, dtype=_dtype, scope=_scope):
                config = replace(BASE, **options)
                check_group(comm, config, uneven(comm.size), dtype, loss_scope=scope)

            CASES[f"{_name}, {_dtype}, {_scope}"] = _run
for _name, _inputs in INPUTS.items():
    for _scope in ("group", "local"):

        def _run(comm, inputs=_inputs, scope=_scope):
            check_group(comm, BASE, uneven(comm.size), inputs=inputs, loss_scope=scope)

        CASES[f"{_name}, {_scope}"] = _run
for _dtype in ("bfloat16", "float16"):

    def _run(comm, dtype=_dtype):
        check_group(comm, replace(BASE, d_model=40, ffn_dim=80), uneven(comm.size), dtype)

    CASES[f"plain, {_dtype}"] = _run

for _dtype in ("float64", "float32"):
    workload("balanced", lambda ranks: [16] * ranks, _dtype, num_experts=8, top_k=2)
    workload("all to one rank", lambda n: [9] * n, _dtype, lambda n: expert_range(7, n, n - 1), top_k=1)
    workload("one hot expert", lambda ranks: [9] * ranks, _dtype, lambda ranks: [3])
    workload("a rank without tokens", lambda ranks: [0, *[9] * (ranks - 1)], _dtype)
    workload("no tokens at all", lambda ranks: [0] * ranks, _dtype)
    workload("one token in all", lambda ranks: [0] * (ranks - 1) + [1], _dtype)
    workload("K = E", uneven, _dtype, top_k=7)
    workload("many tokens", lambda ranks: [300] * ranks, _dtype)


for _chunks, _dtype in ((2, "float64"), (3, "float32"), (4, "bfloat16")):
    workload(f"{_chunks} chunks", lambda n: [16 + 5 * r for r in range(n)], _dtype, ep_chunks=_chunks)
workload("2 chunks, recomputed", uneven, "float32", ep_chunks=2, recompute_activations=True)
workload("2 chunks, dropped", uneven, ep_chunks=2, capacity_factor=0.75)
workload("3 chunks, one hot expert", lambda n: [9] * n, favoured=lambda n: [3], ep_chunks=3)
workload("3 chunks, a rank without tokens", lambda n: [0, *[9] * (n - 1)], ep_chunks=3)
workload("2 chunks, no tokens at all", lambda n: [0] * n, ep_chunks=2)
workload("3 chunks, one token in all", lambda n: [0] * (n - 1) + [1], ep_chunks=3)
workload("3 chunks, many tokens", lambda n: [300] * n, "bfloat16", ep_chunks=3)


@case("stress")
def stress(comm):
    """Random configurations, the same on every rank."""
    for seed in range(125):
        rng = np.random.default_rng([comm.size, seed])
        experts = int(rng.integers(comm.size, 12))
        bounds = rng.integers(0, 4)
        config = MoEConfig(
            d_model=int(rng.choice([1, 3, 8, 20])),
            ffn_dim=2 * int(rng.choice([1, 3, 8, 20])),
            num_experts=experts,
            top_k=int(rng.integers(1, experts + 1)),
            activation=str(rng.choice(["swiglu", "geglu", "relu_squared"])),
            gating=str(rng.choice(["softmax", "sigmoid"])),
            norm_topk_prob=bool(rng.integers(2)),
            capacity_factor=float(rng.choice([0.5, 1.0, 1.25])) if bounds & 1 else None,
            max_tokens_per_expert=int(rng.integers(1, 8)) if bounds & 2 else None,
            drop_policy=str(rng.choice(["position", "probs"])),
            aux_loss_coeff=float(rng.choice([0, 0.1])),
            z_loss_coeff=float(rng.choice([0, 0.1])),
            recompute_activations=bool(rng.integers(2)),
        )
        tokens = [int(count) for count in rng.choice([0, 1, 2, 5, 17], comm.size)]
        inputs = tuple(name for names in INPUTS.values() for name in names if rng.random() < 0.15)
        scope, chunks = str(rng.choice(["group", "local"])), int(rng.choice([1, 1, 2, 3]))
        try:
            check_group(comm, config, tokens, inputs=inputs, loss_scope=scope, seed=seed, ep_chunks=chunks)
        except Exception as error:
            what = f"{config}, tokens {tokens}, {inputs}, {scope}, {chunks} chunks"
            raise AssertionError(f"seed {seed}: {what}") from error


@case("steps of an optimizer")
def steps(comm):
    """Several steps of gradient descent stay those of one process."""
    tokens = uneven(comm.size)
    whole, mine = (group_layer(BASE, tokens, "float64") for _ in range(2))
    for _ in range(4):
        want = single_process(whole, BASE, (), "group", "float64")
        ep, _, grads = run_group(comm, BASE, mine)
        own = slice(ep.experts.start, ep.experts.stop)
        mine.gate_weight -= 0.01 * summed(comm, grads.gate_weight)
        mine.w_up[own] -= 0.01 * grads.w_up
        mine.w_down[own] -= 0.01 * grads.w_down
        for name, gradient in want.weights.items():
            getattr(whole, name)[...] -= 0.01 * gradient
    assert_close(mine.gate_weight, whole.gate_weight, "float64", "gate_weight")
    assert_close(mine.w_up[own], whole.w_up[own], "float64", "w_up")
    assert_close(mine.w_down[own], whole.w_down[own], "float64", "w_down")


@case("the same bits every time")
def repeatable(comm):
    layer = group_layer(BASE, uneven(comm.size), "float32")
    for chunks in (1, 2):
        runs = []
        for _ in range(3):
            _, result, grads = run_group(comm, BASE, layer, ep_chunks=chunks)
            parts = (result.output, result.losses, *grads)
            runs.append([part.tobytes() for part in parts if part is not None])
        assert runs[0] == runs[1] == runs[2]


@case("one rank has the bits of no group at all")
def alone(comm):
    layer = group_layer(BASE, [33], "float32")
    want = single_process(layer, BASE, (), "group", "float32")
    _, result, _ = run_group(LocalCommunicator(), BASE, layer)
    assert result.output.tobytes() == want.output[0].tobytes()


@case("weight gradients added to sums")
def weight_sums(comm):
    for dtype, chunks in (("float32", 1), ("float64", 1), ("float64", 2)):
        layer = group_layer(BASE, uneven(comm.size), dtype)
        _, _, plain = run_group(comm, BASE, layer)
        sums = {"w_up_grad": np.full_like(plain.w_up, 0.5), "w_down_grad": np.full_like(plain.w_down, 0.5)}
        _, _, added = run_group(comm, BASE, layer, sums=sums, ep_chunks=chunks)
        for got, want in ((added.w_up, plain.w_up), (added.w_down, plain.w_down)):
            assert want.any()
            assert_close(got.astype(np.float64), want.astype(np.float64) + 0.5, dtype, "sums")


@case("weight gradients in parts, beside an exchange and after it")
def weight_gradients_in_parts(comm):
    layer = group_layer(BASE, uneven(comm.size), "float32")
    stage = CpuBackend.grouped_glu_backward

    def writing_dp_of_all_rows(space, *arguments):
        """As other backends may: what is not of the experts it is given is of no use then."""
        host_numbers(arguments[9])[:] = np.nan
        stage(space, *arguments)

    for chunks in (1, 2):
        _, _, whole = run_group(comm, BASE, layer, ep_chunks=chunks)
        for flops_a_byte in (0, 3, 20, 1e9):
            with (
                mock.patch.object(comm, "multiprocessors", 2),
                mock.patch.object(ep_exchange, "FLOPS_A_BYTE", flops_a_byte),
                mock.patch.object(CpuBackend, "grouped_glu_backward", staticmethod(writing_dp_of_all_rows)),
            ):
                _, _, parts = run_group(comm, BASE, layer, ep_chunks=chunks)
            for name in ("x", "gate_weight", "w_up", "w_down"):
                assert getattr(parts, name).tobytes() == getattr(whole, name).tobytes(), (
                    chunks,
                    flops_a_byte,
                    name,
                )


@case("what a product beside the dispatch is to spare")
def room_beside_the_dispatch(comm):
    """Multiprocessors, for as long as the most that this rank can send to others takes."""
    layer = group_layer(BASE, uneven(comm.size), "float32")
    asked = []
    with (
        mock.patch.object(comm, "multiprocessors", 2),
        mock.patch.object(ep_exchange, "FLOPS_A_BYTE", 5.0),
    ):
        ep = ExpertParallel(comm, BASE)
        x, gate = (
            kind_of(comm).array(part, "float32")
            for part in (layer.x[layer.cuts[comm.rank]], layer.gate_weight)
        )
        dispatched = ep.dispatch(x, gate, meanwhile=lambda *spared: asked.append(spared))
    most = len(x) * min(BASE.top_k, comm.size - 1)
    others = np.arange(comm.size) != comm.rank
    assert np.array(dispatched.sizes.sent)[others].sum() <= most
    assert asked == [(2, 5.0 * most * 4 * BASE.d_model)]
    ep.combine(dispatched.received, dispatched)


@case("nothing kept for backward")
def inference(comm):
    layer = group_layer(BASE, uneven(comm.size), "float32")
    for chunks in (1, 2):
        _, kept, grads = run_group(comm, BASE, layer, ep_chunks=chunks)
        _, result, others = run_group(comm, BASE, layer, save=False, ep_chunks=chunks)
        assert kept.z is not None
        assert result.z is None
        assert result.output.tobytes() == kept.output.tobytes()
        assert grads.w_up.tobytes() == others.w_up.tobytes()


@case("configurations that differ")
def mismatch(comm):
    for name, value in (("top_k", 2), ("num_experts", 9), ("activation", "geglu"), ("d_model", 25)):
        config = replace(BASE, **{name: value}) if comm.rank == comm.size - 1 else BASE
        if comm.size == 1:
            ExpertParallel(comm, config, layer="blocks.1")
            continue
        with pytest.raises(ConfigError, match=f"do not agree on {name} for blocks.1") as raised:
            ExpertParallel(comm, config, layer="blocks.1")
        assert f"rank {comm.size - 1}: {value!r}" in str(raised.value)


@case("a wrong option on one rank")
def wrong_option(comm):
    scope = "world" if comm.rank == comm.size - 1 else "group"
    if comm.size == 1:
        with pytest.raises(ConfigError, match="loss_scope='world' is unknown"):
            ExpertParallel(comm, BASE, loss_scope=scope)
    else:
        with pytest.raises(ConfigError, match="do not agree on loss_scope"):
            ExpertParallel(comm, BASE, loss_scope=scope)


@case("wrong chunks")
def wrong_chunks(comm):
    for chunks in (0, -1, 2.0, True, "2", None):
        with pytest.raises(ConfigError, match="ep_chunks="):
            ExpertParallel(comm, BASE, ep_chunks=chunks)
    most = 1024 // max(comm.size, -(-BASE.num_experts // comm.size))
    ExpertParallel(comm, BASE, ep_chunks=most)
    with pytest.raises(ConfigError, match=f"ep_chunks={most + 1} is too many .*at most {most}"):
        ExpertParallel(comm, BASE, ep_chunks=most + 1)
    if comm.size > 1:
        with pytest.raises(ConfigError, match="do not agree on ep_chunks"):
            ExpertParallel(comm, BASE, ep_chunks=1 + comm.rank)


@case("with chunks what the experts return is on its way home")
def other_rows(comm):
    group = MpiCommunicator(timeout=10)  # which will be of no more use
    layer = ExpertParallel(group, BASE, ep_chunks=2)
    weights = group_layer(BASE, [5] * comm.size, "float32")
    own = slice(layer.experts.start, layer.experts.stop)
    dispatched = layer.dispatch(weights.x[weights.cuts[comm.rank]], weights.gate_weight)
    rows, _ = layer.run_experts(dispatched.received, dispatched, weights.w_up[own], weights.w_down[own])
    with pytest.raises((ConfigError, CommError), match="ep_chunks=2: rows are on their way home"):
        layer.combine(2 * rows, dispatched)


@case("with chunks rows that are on their way to the experts")
def rows_without_experts(comm):
    layer = ExpertParallel(LocalCommunicator(), BASE, ep_chunks=2)
    weights = group_layer(BASE, [5], "float32")
    dispatched = layer.dispatch(weights.x, weights.gate_weight)
    with pytest.raises(ConfigError, match=r"ep_chunks=2: .* combine comes after run_experts"):
        layer.combine(dispatched.received, dispatched)


@case("dtypes that differ")
def mismatched_dtypes(comm):
    group = MpiCommunicator(timeout=10)  # which will be of no more use
    ep = ExpertParallel(group, BASE, layer="blocks.1")
    dtype = "float16" if comm.rank > 0 else "float32"
    x, gate = np.zeros((2, BASE.d_model), dtype), np.zeros((BASE.num_experts, BASE.d_model), dtype)
    if comm.size == 1:
        ep.dispatch(x, gate)
        return
    with pytest.raises(ConfigError, match=r"do not agree on dtype for blocks\.1.*rank 1: 'float16'"):
        ep.dispatch(x, gate)


@case("widths that differ")
def mismatched_widths(comm):
    """Where the router reads something else, the tokens that cross may be of any width, but of one."""
    group = MpiCommunicator(timeout=10)  # which will be of no more use
    ep = ExpertParallel(group, BASE, layer="blocks.1")
    gate, read = (np.zeros((rows, BASE.d_model), "float32") for rows in (BASE.num_experts, 2))
    x = np.zeros((2, 6 if comm.rank > 0 else 4), "float32")
    if comm.size == 1:
        ep.dispatch(x, gate, router_input=read)
        return
    with pytest.raises(ConfigError, match=r"do not agree on width for blocks\.1.*rank 1: 6"):
        ep.dispatch(x, gate, router_input=read)


@case("more ranks than experts")
def too_few(comm):
    config = replace(BASE, num_experts=1, top_k=1)
    if comm.size > 1:
        with pytest.raises(ConfigError, match="num_experts=1"):
            ExpertParallel(comm, config)


@case("an error on one rank is one on all, and the next group works")
def one_raises(comm):
    group = MpiCommunicator(timeout=10)  # which will be of no more use
    config = replace(BASE, max_tokens_per_expert=1, allow_dropped_tokens=False)
    layer = group_layer(config, [1] * (comm.size - 1) + [30], "float32")
    expected = CapacityError if comm.rank == comm.size - 1 else CommError
    with pytest.raises(expected) as raised:
        run_group(group, config, layer)
    if expected is CommError:
        assert raised.value.ranks == (comm.size - 1,)
        assert "raised CapacityError" in str(raised.value)
    # a group of one goes on: nobody else has heard of it
    again, message = (CommError, "the group failed before") if comm.size > 1 else (CapacityError, "rows")
    with pytest.raises(again, match=message):
        run_group(group, config, layer)
    check_group(comm, BASE, uneven(comm.size))


@case("a rank leaves out a call")
def out_of_step(comm):
    if comm.size == 1:
        return
    group = MpiCommunicator(timeout=1)  # which will be of no more use

    def calls():
        if comm.rank > 0:
            all_reduced(group, np.ones(3), Step("extra", "blocks.1"))
        group.gather("", Step("meeting", "blocks.2"))
        group.gather("", Step("meeting", "blocks.3"))

    with pytest.raises(CommError, match="all ranks are there") as raised:
        calls()
    assert "rank 0 at meeting of blocks" in str(raised.value)
    assert "rank 1 at extra of blocks.1" in str(raised.value)


@case("losses of the group need a gradient from every rank")
def no_loss_gradient(comm):
    group = MpiCommunicator(timeout=10)  # which will be of no more use
    layer = group_layer(BASE, [3] * comm.size, "float32")
    layer.grad_losses = None
    with pytest.raises(ConfigError, match="grad_losses=None"):
        run_group(group, BASE, layer)


@case("rows of another width need what the router read in backward, too")
def router_input_forgotten(comm):
    group = MpiCommunicator(timeout=10)  # which will be of no more use
    layer = ExpertParallel(group, BASE)
    tokens, gate = np.ones((3, BASE.d_model), "float32"), np.ones((BASE.num_experts, BASE.d_model), "float32")
    for width in (BASE.d_model // 2, 4 * BASE.d_model):
        narrow = np.ones((3, width), "float32")
        dispatched = layer.dispatch(narrow, gate, router_input=tokens)
    with pytest.raises(ShapeError, match=rf"x has shape \(3, {width}\)"):
        layer.dispatch_backward(dispatched.received, dispatched.weights, dispatched, narrow, gate)


@case("communicator: sums, barrier, gather")
def primitives(comm):
    kind = kind_of(comm)
    for dtype in (np.int32, np.int64, np.float32, np.float64):
        total = all_reduced(comm, kind.array(np.arange(5) * (comm.rank + 1), dtype), Step("sum"))
        assert kind.host(total).tolist() == (np.arange(5) * sum(range(1, comm.size + 1))).tolist()
    for dtype in ("float16", "uint8", "bool"):
        with pytest.raises(
            DTypeError, match=f"array has dtype {'uint8' if dtype == 'bool' else dtype}; expected int32"
        ):
            all_reduced(comm, kind.array(np.zeros(3), dtype), Step("sum"))
    assert comm.gather(f"é{comm.rank}" * comm.rank, Step("texts")) == [f"é{r}" * r for r in range(comm.size)]
    comm.barrier(Step("barrier"))


@case("communicator: several exchanges under way")
def under_way(comm):
    """Started one after the other, waited for in another order; ranks send what they have, or nothing."""
    kind, ranks, me = kind_of(comm), range(comm.size), comm.rank
    to_ranks = [(me + rank) % 3 for rank in ranks]
    from_ranks = [(rank + me) % 3 for rank in ranks]
    rows = kind.array(100 * me + np.repeat(ranks, to_ranks)[:, None] + np.zeros(5), np.float32)
    came = kind.array(np.full((sum(from_ranks), 5), -1), np.float32)
    sums, numbers = (kind.array(np.full(shape, -1), np.int32) for shape in (3, (comm.size, 1)))
    (send, space), (recv, _) = as_array(rows), as_array(came)
    (to_sum, _), (total, _) = as_array(kind.array([me, 1, 7], np.int32)), as_array(sums)
    (mine, _), (theirs, _) = as_array(kind.array(np.full((comm.size, 1), me), np.int32)), as_array(numbers)
    transfers = [
        comm.all_to_all_v(space, [(send, recv)], to_ranks, from_ranks, Step("rows")),
        comm.all_reduce(space, [(to_sum, total)], Step("sum")),
        comm.all_to_all(space, mine, theirs, Step("numbers")),
    ]
    for transfer in reversed(transfers):
        transfer.wait()
    assert comm.read(space, theirs, Step("numbers"))()[:, 0].tolist() == list(ranks)
    assert kind.host(sums).tolist() == [sum(ranks), comm.size, 7 * comm.size]
    wanted = 100 * np.repeat(ranks, from_ranks) + me
    assert (kind.host(came) == wanted[:, None]).all()
