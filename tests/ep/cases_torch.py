"""Cases for every rank: a sharded MoELayer is the layer of one process, over MPI and over gloo."""

import copy
import pickle
import tempfile
import time
from contextlib import nullcontext
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ffmoe_core import expert_range
from ffmoe_core.comm import Step
from ffmoe_core.comm.base import DEFAULT_TIMEOUT
from ffmoe_core.errors import (
    CommError,
    ConfigError,
    DeviceError,
    DTypeError,
    ShapeError,
    UnsupportedError,
)
from ffmoe_core.expert_parallel import aborting
from ffmoe_torch import (
    MoELayer,
    clip_grad_norm_,
    ddp_ignored,
    full_state_dict,
    get_dense_params,
    shard_experts,
)
from ffmoe_torch.communicator import communicator_for
from ffmoe_torch.store_control import StoreControl
from tests.support import assert_close
from tests.torch.checks import numbers

SIZES = {"d_model": 24, "ffn_dim": 32, "num_experts": 7, "top_k": 3}
LOSSES = {"aux_loss_coeff": 0.1, "z_loss_coeff": 0.01}
OPTIONS = {
    "plain": {},
    "latent": {"latent_dim": 9},
    "latent and shared": {"latent_dim": 9, "num_shared_experts": 2},
    "shared": {"num_shared_experts": 1},
    "recompute": {"recompute_activations": True},
    "inject": {"aux_mode": "inject"},
    "expert bias": {"expert_bias": True},
    "sigmoid": {"gating": "sigmoid", "norm_topk_prob": False},
    "no losses": {"aux_loss_coeff": 0.0, "z_loss_coeff": 0.0},
}
CASES = {}


@cache
def gloo(comm):
    """The process group of all ranks, over gloo."""
    folder = comm.gather(tempfile.mkdtemp() if comm.rank == 0 else "", Step("gloo"))[0]
    init = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=init, rank=comm.rank, world_size=comm.size)
    return dist.group.WORLD


def group_of(comm, backend):
    return gloo(comm) if backend == "torch" else MPI.COMM_WORLD


def make_layer(dtype=torch.float64, **options):
    """The same on every rank, with a router that has an opinion."""
    torch.manual_seed(0)
    layer = MoELayer(**{**SIZES, **LOSSES, **options}, dtype=dtype)
    with torch.no_grad():
        layer.gate.weight.mul_(100)
        if layer.expert_bias is not None:
            layer.expert_bias.uniform_(-0.2, 0.2)
    return layer


def make_tokens(counts, dtype=torch.float64, seed=1):
    """All ranks' tokens and output gradients, and where each rank's stand."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(sum(counts), SIZES["d_model"], generator=generator, dtype=dtype) for _ in range(2))
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return x, grad, [slice(a, b) for a, b in pairwise(ends)]


def averaged(comm, tensor):
    """Over the ranks, in host memory, by way of text: nothing of what is tested."""
    texts = comm.gather(numbers(tensor).tobytes().hex(), Step("mean of a test"))
    parts = [torch.frombuffer(bytearray.fromhex(text), dtype=torch.float64) for text in texts]
    return (sum(parts) / comm.size).reshape(tensor.shape)


def check_layer(comm, backend, counts, dtype=torch.float64, ep_chunks=1, device="cpu", group=None, **options):
    """The layer on all ranks, and one process that holds all experts, on the CPU in float64."""
    whole, layer = make_layer(**options), make_layer(dtype, **options).to(device)
    whole.load_state_dict(layer.state_dict())
    layer.shard_experts(group or group_of(comm, backend), backend, ep_chunks=ep_chunks)
    x, grad, cuts = make_tokens(counts, dtype)
    cut, own = cuts[comm.rank], expert_range(7, comm.size, comm.rank)
    mine = x[cut].to(device, copy=True).requires_grad_()
    everyones = x.to(torch.float64, copy=True).requires_grad_()
    output, losses = layer(mine)
    want, want_losses = whole(everyones)
    inject = options.get("aux_mode") == "inject"
    ((output * grad[cut].to(device)).sum() + (0 if inject else sum(losses.values()))).backward()
    # the mean of the ranks' objectives; in the injected one the losses count as they are
    (((want * grad).sum()) / comm.size + (0 if inject else sum(want_losses.values()))).backward()

    name = str(dtype).removeprefix("torch.")

    def close(got, expected, what, **scale):
        assert_close(numbers(got), numbers(expected), name, what, **scale)

    near = {"scale": 1.0, "independent": sum(counts) * 3}
    close(output, want[cut], "output")
    for key, loss in want_losses.items():
        close(losses[key][None], loss[None], key)
    close(mine.grad / comm.size, everyones.grad[cut], "gradient of x", scale=1.0)
    stats, wanted = layer.stats(), whole.stats()
    assert stats.tokens_per_expert.tolist() == wanted.tokens_per_expert.tolist()
    assert (stats.dropped, stats.load_imbalance) == (wanted.dropped, wanted.load_imbalance)
    assert abs(stats.router_entropy - wanted.router_entropy) < 1e-5
    expected = dict(whole.named_parameters())
    for key, parameter in layer.named_parameters():
        if key in ("w_up", "w_down"):
            close(parameter.grad, expected[key].grad[list(own)], f"gradient of {key}")
        else:
            close(averaged(comm, parameter.grad), expected[key].grad, f"gradient of {key}", **near)
    if layer.expert_bias is not None:
        layer.update_expert_bias(0.01)
        whole.update_expert_bias(0.01)
        assert layer.expert_bias.tolist() == whole.expert_bias.tolist()


for _backend in ("mpi", "torch"):
    for _name, _options in OPTIONS.items():

        def _run(comm, backend=_backend, options=_options):
            check_layer(comm, backend, [5 + 4 * rank for rank in range(comm.size)], **options)

        CASES[f"{_name}, {_backend}"] = _run
    for _name, _counts in {
        "a rank without tokens": lambda ranks: [0, *[9] * (ranks - 1)],
        "one token in all": lambda ranks: [0] * (ranks - 1) + [1],
        "no tokens at all": lambda ranks: [0] * ranks,
    }.items():

        def _run(comm, backend=_backend, counts=_counts):
            check_layer(comm, backend, counts(comm.size), latent_dim=9)

        CASES[f"{_name}, {_backend}"] = _run

    for _chunks, _name in ((3, "plain"), (2, "shared"), (2, "recompute"), (2, "expert bias")):

        def _run(comm, backend=_backend, chunks=_chunks, options=OPTIONS[_name]):
            counts = [0, *[5 + 4 * rank for rank in range(1, comm.size)]] if comm.size > 1 else [7]
            check_layer(comm, backend, counts, ep_chunks=chunks, **options)

        CASES[f"{_name}, {_chunks} chunks, {_backend}"] = _run

    def _run(comm, backend=_backend):
        check_layer(comm, backend, [9] * comm.size, torch.float32)

    CASES[f"float32, {_backend}"] = _run


def case(function):
    CASES[function.__name__.replace("_", " ")] = function
    return function


class Model(nn.Module):
    def __init__(self, dtype=torch.float64, **options):
        super().__init__()
        self.first = nn.Linear(SIZES["d_model"], SIZES["d_model"], dtype=dtype)
        options = {"expert_bias": True, "latent_dim": 9, **options}
        self.layers = nn.ModuleList([make_layer(dtype, **options) for _ in range(2)])

    def forward(self, x):
        x = self.first(x)
        total = 0.0
        for layer in self.layers:
            output, losses = layer(x)
            x, total = x + output, total + sum(losses.values())
        return x, total


def train(model, x, target, step, forward=None, optimizer=None):
    """A few steps; ``step`` is called between the gradients and the optimizer's step."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for _ in range(4):
        optimizer.zero_grad()
        output, losses = (forward or model)(x)
        ((output - target).square().mean() + losses).backward()
        norms.append(float(step()))
        optimizer.step()
        for layer in model.layers:
            layer.update_expert_bias(0.01)
    return norms


@case
def data_parallel_training(comm, backend="torch", device="cpu"):
    """DDP over the dense parameters, clipped gradients: step by step the training of one process."""
    x, target, cuts = make_tokens([8] * comm.size)
    torch.manual_seed(0)
    whole, model = Model(), Model().to(device)
    model.load_state_dict(whole.state_dict())
    shard_experts(model, gloo(comm), backend)
    assert [layer._sharded.name for layer in model.layers] == ["layers.0", "layers.1"]
    ignored = ddp_ignored(model)
    assert sorted(ignored) == [
        f"layers.{i}.{name}" for i in range(2) for name in ("expert_counts", "w_down", "w_up")
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    wrapped = DistributedDataParallel(model, process_group=gloo(comm))
    mine = (tensor[cuts[comm.rank]].to(device) for tensor in (x, target))
    norms = train(model, *mine, partial(clip_grad_norm_, model, 0.5), wrapped)
    wanted = train(whole, x, target, lambda: torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5))
    assert max(wanted) > 0.5
    assert norms == pytest.approx(wanted, rel=1e-10)
    check_state(model.state_dict(), whole.state_dict(), expert_range(7, comm.size, comm.rank))


@case
def counts_under_data_parallel(comm):
    """DDP gives every rank the first one's buffers before a call, and counts are added up over several."""
    whole, layer = make_layer(expert_bias=True), make_layer(expert_bias=True)
    layer.shard_experts(gloo(comm), "torch")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(layer, ddp_ignored(layer))
    wrapped = DistributedDataParallel(layer, process_group=gloo(comm))
    x, _, cuts = make_tokens([5 + 4 * rank for rank in range(comm.size)])
    for _ in range(3):
        wrapped(x[cuts[comm.rank]])[0].sum().backward()
        whole(x)
    assert whole.expert_counts.sum() > 0
    assert torch.equal(averaged(comm, layer.expert_counts) * comm.size, whole.expert_counts.double())


def check_state(got, wanted, experts):
    """Whether state dicts are the same but for rounding, where ``got`` has some of the experts."""
    assert list(got) == list(wanted)
    for name, want in wanted.items():
        of_experts = name.endswith(("w_up", "w_down")) and "shared_expert" not in name
        want = want[list(experts)] if of_experts else want
        value = got[name].full_tensor() if isinstance(got[name], DTensor) else got[name]
        torch.testing.assert_close(
            value.cpu(), want, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


def expert_parameters(model):
    return [weight for layer in model.layers for weight in layer.expert_params]


@case
def fully_sharded_training(comm):
    """FSDP2 over the dense parameters, a block at a time, experts left alone: step by step that of one process."""
    x, target, cuts = make_tokens([8] * comm.size)
    cut, experts = cuts[comm.rank], expert_range(7, comm.size, comm.rank)
    gloo(comm)
    mesh = init_device_mesh("cpu", (comm.size,))
    for options in ({}, {"reshard_after_forward": False}):
        torch.manual_seed(0)
        whole, model = Model(), Model()
        model.load_state_dict(whole.state_dict())
        shard_experts(model, mesh.get_group(), "torch")
        ignored = set(expert_parameters(model))
        for block in (*model.layers, model):
            fully_shard(block, mesh=mesh, ignored_params=ignored, **options)
        assert {isinstance(parameter, DTensor) for parameter in get_dense_params(model)} == {True}
        assert not any(isinstance(parameter, DTensor) for parameter in expert_parameters(model))

        output, losses = model(x[cut])
        ((output - target[cut]).square().mean() + losses).backward()
        wanted, want_losses = whole(x)
        ((wanted - target).square().mean() + want_losses).backward()
        torch.testing.assert_close(output, wanted[cut])
        got = {name: parameter.grad for name, parameter in model.named_parameters()}
        check_state(got, {name: parameter.grad for name, parameter in whole.named_parameters()}, experts)

        norms = train(model, x[cut], target[cut], partial(clip_grad_norm_, model, 0.5))
        wanted = train(whole, x, target, partial(clip_grad_norm_, whole, 0.5))
        assert norms == pytest.approx(wanted, rel=1e-10)
        check_state(model.state_dict(), whole.state_dict(), experts)
        check_state(full_state_dict(model), whole.state_dict(), range(7))


@case
def experts_times_data(comm):
    """Groups of two ranks that hold all experts between them, replicated."""
    if comm.size != 4:
        return
    gloo(comm)
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    replicas = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    whole, layer = make_layer(), make_layer()
    layer.shard_experts(groups[comm.rank // 2], "torch", loss_scope="local")
    x, grad, cuts = make_tokens([6] * 4)
    cut = cuts[comm.rank]
    output, losses = layer(x[cut])
    ((output * grad[cut]).sum() + sum(losses.values())).backward()
    total = 0.0
    for part in cuts:
        want, want_losses = whole(x[part])
        total = total + ((want * grad[part]).sum() + sum(want_losses.values())) / 4
    total.backward()
    own = list(expert_range(7, 2, comm.rank % 2))
    for parameter, want in ((layer.w_up, whole.w_up), (layer.w_down, whole.w_down)):
        dist.all_reduce(parameter.grad, group=replicas[comm.rank % 2])
        torch.testing.assert_close(parameter.grad / 2, want.grad[own])
    torch.testing.assert_close(averaged(comm, layer.gate.weight.grad), whole.gate.weight.grad)


@case
def gradients_as_sums(comm):
    """grad_reduction="sum": of the sum of all ranks' objectives."""
    whole, layer = make_layer(**dict.fromkeys(LOSSES, 0.0)), make_layer(**dict.fromkeys(LOSSES, 0.0))
    layer.shard_experts(MPI.COMM_WORLD, "mpi", grad_reduction="sum")
    x, grad, cuts = make_tokens([5] * comm.size)
    (layer(x[cuts[comm.rank]])[0] * grad[cuts[comm.rank]]).sum().backward()
    (whole(x)[0] * grad).sum().backward()
    own = list(expert_range(7, comm.size, comm.rank))
    torch.testing.assert_close(layer.w_up.grad, whole.w_up.grad[own])
    torch.testing.assert_close(averaged(comm, layer.gate.weight.grad) * comm.size, whole.gate.weight.grad)


def with_sums(layer, fill):
    for weight in layer.expert_params:
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        weight.main_grad = torch.full_like(weight, fill, dtype=kind, requires_grad=False)
    return layer


@case
def main_grads(comm):
    """Every backward adds the experts' gradients, scaled but not rounded, to what main_grad holds."""
    for backend, reduction in (("mpi", "mean"), ("torch", "mean"), ("mpi", "sum")):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            layer, plain = make_layer(dtype, latent_dim=9, main_grad=True), make_layer(dtype, latent_dim=9)
            for one in (layer, plain):
                one.shard_experts(group_of(comm, backend), backend, grad_reduction=reduction)
            with_sums(layer, 0.0)
            x, grad, cuts = make_tokens([7] * comm.size, dtype)
            for one in (layer, plain):
                output, losses = one(x[cuts[comm.rank]])
                ((output * grad[cuts[comm.rank]]).sum() + sum(losses.values())).backward()
            assert torch.equal(layer.gate.weight.grad, plain.gate.weight.grad)
            for ours, theirs in zip(layer.expert_params, plain.expert_params, strict=True):
                assert ours.grad is None
                torch.testing.assert_close(ours.main_grad.to(dtype), theirs.grad)
                if dtype == torch.bfloat16:
                    assert not torch.equal(ours.main_grad, theirs.grad.to(ours.main_grad.dtype))
            once = [weight.main_grad.clone() for weight in layer.expert_params]
            with_sums(layer, 0.5)
            for _ in range(2):
                output, losses = layer(x[cuts[comm.rank]])
                ((output * grad[cuts[comm.rank]]).sum() + sum(losses.values())).backward()
            for weight, single in zip(layer.expert_params, once, strict=True):
                torch.testing.assert_close(weight.main_grad, 0.5 + 2 * single)


@case
def main_grads_under_autocast_and_compiled(comm):
    layer, plain = make_layer(torch.float32, main_grad=True), make_layer(torch.float32)
    for one in (layer, plain):
        one.shard_experts(MPI.COMM_WORLD, "mpi")
    x, _, cuts = make_tokens([4] * comm.size, torch.float32)
    x = x[cuts[comm.rank]].requires_grad_()
    torch._dynamo.reset()
    for dtype, rounding in ((torch.bfloat16, 0.02), (None, 1e-5)):
        with_sums(layer, 0.0)
        plain.zero_grad()
        for one in (layer, plain):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                call = one if dtype is not None else torch.compile(one, backend="aot_eager")
                output, _ = call(x)
            output.float().square().sum().backward()
        for ours, theirs in zip(layer.expert_params, plain.expert_params, strict=True):
            assert ours.grad is None
            torch.testing.assert_close(ours.main_grad, theirs.grad, rtol=rounding, atol=rounding)


@case
def main_grads_from_before_the_experts_were_spread(comm):
    """They are of all experts, which is one too many where there is more than one rank."""
    layer = with_sums(make_layer(main_grad=True), 0.0)
    layer.shard_experts(MPI.COMM_WORLD, "mpi", ep_timeout=19)  # used up here
    x, _, cuts = make_tokens([4] * comm.size)
    with pytest.raises(ShapeError, match=r"w_up\.main_grad has shape") if comm.size > 1 else nullcontext():
        layer(x[cuts[comm.rank]])


@case
def parameters_that_are_drawn_again(comm):
    """As in one process, so that what all ranks hold alike stays so; also for a layer that was on the meta device."""
    options = {"num_shared_experts": 1, "latent_dim": 9}
    whole, layer = make_layer(**options), make_layer(**options)
    shard_experts(layer, comm)
    with torch.device("meta"):
        empty = make_layer(**options)
    shard_experts(empty, comm)
    own = expert_range(7, comm.size, comm.rank)
    for drawn in (layer, empty.to_empty(device="cpu")):
        torch.manual_seed(3)
        whole.reset_parameters()
        torch.manual_seed(3)
        drawn.reset_parameters()
        check_state(drawn.state_dict(), whole.state_dict(), own)


@case
def an_optimizer_made_before(comm):
    """Experts are the parameters that it knows, and so it trains them."""
    x, target, cuts = make_tokens([8] * comm.size)
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shard_experts(model, comm)
    before = [weights.detach().clone() for layer in model.layers for weights in layer.expert_params]
    mine = (tensor[cuts[comm.rank]] for tensor in (x, target))
    train(model, *mine, lambda: 0.0, optimizer=optimizer)
    after = [weights for layer in model.layers for weights in layer.expert_params]
    for old, new in zip(before, after, strict=True):
        assert (old != new).any(dim=(1, 2)).all()


@case
def main_grads_of_what_is_asked_for(comm):
    """Frozen weights need no main_grad; losses alone give the experts no gradient; others asked for, it is added."""
    layer = make_layer(main_grad=True)
    layer.shard_experts(MPI.COMM_WORLD, "mpi")
    with_sums(layer, 0.0)
    x, _, cuts = make_tokens([4] * comm.size)
    x = x[cuts[comm.rank]].requires_grad_()
    sum(layer(x)[1].values()).backward()
    assert layer.gate.weight.grad.any()
    assert not any(weight.main_grad.any() for weight in layer.expert_params)
    torch.autograd.grad(layer(x)[0].sum(), x)
    assert all(weight.main_grad.any() for weight in layer.expert_params)
    layer.w_up.requires_grad_(False)
    del layer.w_up.main_grad
    once = layer.w_down.main_grad.clone()
    layer(x)[0].sum().backward()
    torch.testing.assert_close(layer.w_down.main_grad, 2 * once)
    assert layer.w_up.grad is None


@case
def clipping_main_grads(comm):
    layer, plain = make_layer(main_grad=True), make_layer()
    for one in (layer, plain):
        one.shard_experts(gloo(comm), "torch")
    with_sums(layer, 0.0)
    x, _, cuts = make_tokens([4] * comm.size)
    for one in (layer, plain):
        one(x[cuts[comm.rank]])[0].square().sum().backward()
        one.gate.weight.grad = averaged(comm, one.gate.weight.grad)
    norm = clip_grad_norm_(layer, 0.5)
    assert norm > 0.5
    assert norm == clip_grad_norm_(plain, 0.5)
    assert torch.equal(layer.w_up.main_grad, plain.w_up.grad)


@case
def without_gradients(comm):
    layer, whole = make_layer(torch.float32), make_layer(torch.float32)
    layer.shard_experts(MPI.COMM_WORLD, "mpi")
    x, _, cuts = make_tokens([4] * comm.size, torch.float32)
    with torch.no_grad():
        output, losses = layer(x[cuts[comm.rank]])
        want, want_losses = whole(x)
    assert not output.requires_grad
    torch.testing.assert_close(output, want[cuts[comm.rank]])
    torch.testing.assert_close(losses["aux_loss"], want_losses["aux_loss"])


@case
def autocast_and_activation_checkpointing(comm):
    for chunks in (1, 2):
        check_checkpointing(comm, chunks)


def check_checkpointing(comm, chunks):
    layer, plain = make_layer(torch.float32), make_layer(torch.float32)
    layer.shard_experts(MPI.COMM_WORLD, "mpi", ep_chunks=chunks)
    plain.shard_experts(MPI.COMM_WORLD, "mpi", ep_chunks=chunks)
    x, _, cuts = make_tokens([4] * comm.size, torch.float32)
    results = []
    for call in (lambda t: checkpoint(layer, t, use_reentrant=False), plain):
        leaf = x[cuts[comm.rank]].clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, losses = call(leaf)
        assert output.dtype == torch.bfloat16
        (output.float().square().sum() + sum(losses.values())).backward()
        results.append((output, leaf.grad))
    assert all(map(torch.equal, *results))
    assert torch.equal(layer.w_up.grad, plain.w_up.grad)
    assert layer.w_up.grad.dtype == torch.float32


@case
def groups_that_were_freed(comm):
    """MPI gives their handles to new ones."""
    own = MPI.COMM_WORLD.Split(comm.rank)
    make_layer().shard_experts(own)
    own.Free()
    everyone = MPI.COMM_WORLD.Dup()
    layer = make_layer()
    layer.shard_experts(everyone)
    assert len(layer.w_up) == len(expert_range(layer.num_experts, comm.size, comm.rank))


@case
def what_cannot_work(comm):
    layer = make_layer()
    with pytest.raises(ConfigError, match="'auto', 'mpi', 'nccl', 'torch'"):
        layer.shard_experts(MPI.COMM_WORLD, "rccl")
    with pytest.raises(ConfigError, match="needs a ProcessGroup"):
        layer.shard_experts(MPI.COMM_WORLD, "torch")
    with pytest.raises(ConfigError, match="needs an mpi4py communicator"):
        layer.shard_experts(gloo(comm), "mpi")
    with pytest.raises(ConfigError, match=r"ep_group is a builtins\.int"):
        layer.shard_experts(3)
    with pytest.raises(DeviceError, match="needs the layer on a GPU"):
        layer.shard_experts(gloo(comm), "nccl")
    with pytest.raises(ConfigError, match="grad_reduction='median'"):
        layer.shard_experts(MPI.COMM_WORLD, grad_reduction="median")
    with pytest.raises(ConfigError, match="loss_scope='world'"):
        layer.shard_experts(MPI.COMM_WORLD, loss_scope="world")
    if comm.size > 1:
        odd = make_layer(torch.float32 if comm.rank == 1 else torch.float64)
        with pytest.raises(
            ConfigError, match=r"do not agree on dtype for blocks\.2.*rank 1: 'torch.float32'"
        ):
            odd.shard_experts(MPI.COMM_WORLD, name="blocks.2")
        odd = make_layer(**({"latent_dim": 4} if comm.rank == 1 else {}))
        with pytest.raises(ConfigError, match="do not agree on latent_dim"):
            odd.shard_experts(MPI.COMM_WORLD)
    layer.shard_experts(MPI.COMM_WORLD)
    with pytest.raises(ConfigError, match="sharded already"):
        layer.shard_experts(MPI.COMM_WORLD)
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(UnsupportedError, match="state_dict"):
            attempt(layer)


@case
def second_derivatives(comm):
    """Are refused, also where gradients come in that are constants, and whatever is asked for."""
    for chunks in (1, 2):
        layer = make_layer(num_shared_experts=1)
        layer.shard_experts(MPI.COMM_WORLD, "mpi", ep_chunks=chunks)
        x, grad, cuts = make_tokens([4] * comm.size)
        leaf = x[cuts[comm.rank]].clone().requires_grad_()
        inputs = (leaf, layer.gate.weight, layer.w_up, layer.w_down)
        output, losses = layer(leaf)
        for objective in (output.sum(), losses["aux_loss"], output.square().sum() + losses["z_loss"]):
            want = torch.autograd.grad(objective, inputs, retain_graph=True, allow_unused=True)
            gradients = torch.autograd.grad(objective, inputs, create_graph=True, allow_unused=True)
            for gradient, wanted in zip(gradients, want, strict=True):
                torch.testing.assert_close(gradient, wanted)
                for of in (leaf, layer.gate.weight) if gradient is not None else ():
                    with pytest.raises(UnsupportedError, match="no second derivative"):
                        torch.autograd.grad(gradient.sum(), of, retain_graph=True, allow_unused=True)
        coming = grad[cuts[comm.rank]].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(output, layer.w_up, coming, create_graph=True)
        with pytest.raises(UnsupportedError, match="no second derivative"):
            torch.autograd.grad(gradient.sum(), coming, allow_unused=True)
    output, _ = layer(leaf)
    output.sum().backward()  # and nothing is left behind


@case
def layers_share_a_communicator(comm):
    cpu = torch.device("cpu")
    for backend in ("mpi", "torch"):
        group = group_of(comm, backend)
        first = communicator_for(group, backend, 60.0, cpu)
        assert communicator_for(group, "auto", 60.0, cpu) is first
        assert communicator_for(group, backend, 61.0, cpu) is not first
        assert communicator_for(first, "auto", 60.0, cpu) is first
        assert communicator_for(first, "auto", DEFAULT_TIMEOUT, cpu) is first
        for options in ((backend, 60.0), ("auto", 61.0)):
            with pytest.raises(ConfigError, match=r"ep_backend=.* with a Communicator as ep_group"):
                communicator_for(first, *options, cpu)


@case
def notices_of_an_earlier_life(comm):
    """A group that was made anew over the same store hears nothing of what was said in the one before."""
    for life in range(2):
        control = StoreControl(gloo(comm), "lives")
        control.post(f"{life} of {comm.rank}")
        heard = []
        end = time.monotonic() + 20
        while len(heard) < comm.size - 1 and time.monotonic() < end:
            heard += control.poll()
            time.sleep(0.01)
        assert sorted(heard) == [(r, f"{life} of {r}") for r in range(comm.size) if r != comm.rank]
        comm.barrier(Step("life"))


@case
def injected_losses_of_a_compiled_layer(comm):
    """Whatever the tokens' shape: what a compiler makes again behind the exchanges still gives the losses theirs."""
    for shape in ((4, SIZES["d_model"]), (2, 2, SIZES["d_model"])):
        layer = make_layer(torch.float32, aux_mode="inject", num_shared_experts=1)
        shard_experts(layer, comm)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(comm.rank))
        gradients = []
        for call in (layer, torch.compile(layer, backend="aot_eager")):
            layer.zero_grad()
            output, _ = call(x)
            (0 * output).sum().backward()
            gradients.append(layer.gate.weight.grad.clone())
        assert gradients[0].norm() > 0
        torch.testing.assert_close(*gradients)


@case
def checkpoints_of_all_experts(comm):
    """What is gathered from a group loads into any other number of ranks."""
    for backend, dtype in (("mpi", torch.float32), ("torch", torch.bfloat16)):
        whole, layer = make_layer(dtype, expert_bias=True), make_layer(dtype, expert_bias=True)
        model = nn.Sequential(layer)
        shard_experts(model, group_of(comm, backend), backend)
        state = full_state_dict(model)
        assert list(state) == [f"0.{name}" for name in whole.state_dict()]
        for name, value in whole.state_dict().items():
            assert torch.equal(state[f"0.{name}"], value), name
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
        model.load_state_dict(state)
        own = list(expert_range(7, comm.size, comm.rank))
        assert torch.equal(layer.w_up, whole.w_up[own])
        assert torch.equal(layer.w_down, whole.w_down[own])
        model.load_state_dict(model.state_dict())  # of this rank alone
        assert torch.equal(layer.w_up, whole.w_up[own])
        assert len(state["0.w_up"]) == 7


@case
def checkpoints_of_a_layer_with_several_names(comm):
    """Or with others in its state dict than in ``named_modules()``."""
    for options in ({"assign": False}, {"assign": True}):
        whole, layer = make_layer(), make_layer()
        model = nn.ModuleDict({"one": checkpoint_wrapper(layer), "two": layer})
        wanted = {f"{name}.{key}": v for name in ("one", "two") for key, v in whole.state_dict().items()}
        shard_experts(model, gloo(comm), "torch")
        state = full_state_dict(model)
        assert list(state) == list(wanted)
        assert all(torch.equal(state[key], value) for key, value in wanted.items())
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
        model.load_state_dict(state, **options)
        own = list(expert_range(7, comm.size, comm.rank))
        assert torch.equal(layer.w_up, whole.w_up[own])
        assert layer.w_up.untyped_storage().nbytes() == layer.w_up.nbytes  # of these experts, not of all


@case
def gradients_of_another_backward(comm):
    """One that stops between the experts and the dispatch leaves nothing behind for the next."""
    layer = make_layer(latent_dim=9)
    layer.shard_experts(MPI.COMM_WORLD, "mpi")
    x, _, cuts = make_tokens([4] * comm.size)
    output, losses = layer(x[cuts[comm.rank]])
    torch.autograd.grad(output.sum(), layer.proj_up.weight, retain_graph=True)
    (losses["aux_loss"] + 0 * output.sum()).backward(inputs=[layer.gate.weight], retain_graph=True)
    losses["aux_loss"].backward(inputs=[layer.w_up])
    assert layer.w_up.grad is None or not layer.w_up.grad.any()


@case
def an_error_before_the_first_exchange_reaches_every_rank(comm):
    if comm.size == 1:
        return
    x, _, cuts = make_tokens([4] * comm.size)
    x = x[cuts[comm.rank]]

    def forget_sums(layer):
        del layer.w_up.main_grad
        layer(x)

    def forward_mode(layer):
        with forward_ad.dual_level():
            layer(forward_ad.make_dual(x, x))

    def no_memory(layer):
        def fail(*arguments):
            raise torch.OutOfMemoryError("none left")

        layer.proj_up.forward = fail
        layer(x)

    wrong = [
        (ShapeError, lambda layer: layer(x[:, 1:]), lambda layer: layer(x)),
        (DTypeError, lambda layer: layer(x.int()), lambda layer: layer(x)),
        (ConfigError, forget_sums, lambda layer: layer(x)),
        (UnsupportedError, forward_mode, lambda layer: layer(x)),
        (torch.OutOfMemoryError, no_memory, lambda layer: layer(x)),
        (ConfigError, *(lambda layer, rate=rate: layer.update_expert_bias(rate) for rate in (None, 0.1))),
        (ConfigError, *(lambda layer, norm=norm: clip_grad_norm_(layer, norm) for norm in (-1.0, 1.0))),
    ]
    for number, (kind, call, right) in enumerate(wrong):
        layer = make_layer(latent_dim=9, jitter=0.1, main_grad=True, expert_bias=True)
        layer.shard_experts(MPI.COMM_WORLD, "mpi", ep_timeout=20 + number)  # used up here
        with_sums(layer, 0.0)
        with pytest.raises(kind if comm.rank == 1 else CommError) as raised:
            (call if comm.rank == 1 else right)(layer)
        if comm.rank != 1:
            assert raised.value.ranks == (1,)
            assert f"rank 1 raised {kind.__name__}" in str(raised.value)


@case
def an_error_of_the_only_rank(comm):
    """Nobody has to hear of it, and it is over when it was caught."""
    if comm.size == 1:
        layer = make_layer()
        layer.shard_experts(gloo(comm), "torch")
        x, _, _ = make_tokens([4])
        with pytest.raises(ShapeError):
            layer(x[:, 1:])
        layer(x)


@case
def what_ddp_ignores(comm):
    """The experts of layers that are sharded, under all names that they have."""
    layer, other = make_layer(expert_bias=True), make_layer()
    model = nn.ModuleDict({"one": layer, "two": layer, "other": other})
    assert ddp_ignored(model) == []
    layer.shard_experts(gloo(comm), "torch")
    names = [f"{name}.{of}" for name in ("one", "two") for of in ("expert_counts", "w_down", "w_up")]
    assert sorted(ddp_ignored(model)) == names
    other.w_up = layer.w_up
    assert "other.w_up" in ddp_ignored(model)


@case
def transforms(comm):
    x, _, cuts = make_tokens([4] * comm.size)
    x = x[cuts[comm.rank]]
    calls = (
        lambda layer: torch.func.grad(lambda x: layer(x)[0].sum())(x),
        lambda layer: torch.func.jvp(lambda x: layer(x)[0], (x,), (x,)),
    )
    for number, call in enumerate(calls):
        layer = make_layer()
        layer.shard_experts(MPI.COMM_WORLD, "mpi", ep_timeout=17 + number)  # used up here
        with pytest.raises(UnsupportedError, match=r"transforms of torch\.func"), torch.no_grad():
            call(layer)


@case
def an_error_in_backward_reaches_every_rank(comm):
    if comm.size == 1:
        return
    for backend in ("mpi", "torch"):
        layer = make_layer()
        layer.shard_experts(group_of(comm, backend), backend, ep_timeout=10, name="blocks.1")  # used up here
        x, _, cuts = make_tokens([4] * comm.size)
        output, _ = layer(x[cuts[comm.rank]])
        if comm.rank == 1:
            layer._sharded.expert_parallel.run_experts_backward = broken(layer._sharded.comm)
        with pytest.raises(ZeroDivisionError if comm.rank == 1 else CommError) as raised:
            output.sum().backward()
        if comm.rank != 1:
            assert raised.value.ranks == (1,)
            assert "rank 1 raised ZeroDivisionError: by zero" in str(raised.value)
            assert "blocks.1" in str(raised.value)


def broken(comm):
    def method(*args):
        with aborting(comm):
            raise ZeroDivisionError("by zero")

    return method


@case
def chunks_in_several_backward_passes(comm):
    """A kept graph gives the same gradients again; the losses' alone needs no rows; nothing is left under way."""
    layer, plain = make_layer(main_grad=True), make_layer()
    for one, chunks in ((layer, 3), (plain, 1)):
        one.shard_experts(MPI.COMM_WORLD, "mpi", ep_chunks=chunks)
    with_sums(layer, 0.0)
    x, _, cuts = make_tokens([5] * comm.size)
    gradients = []
    for one in (layer, plain):
        leaf = x[cuts[comm.rank]].clone().requires_grad_()
        output, losses = one(leaf)
        for _ in range(2):
            output.square().sum().backward(retain_graph=True)
            losses["aux_loss"].backward(retain_graph=True)
        gradients.append((leaf.grad, one.gate.weight.grad))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)
    for weight, other in zip(layer.expert_params, plain.expert_params, strict=True):
        torch.testing.assert_close(weight.main_grad, other.grad)
    assert not layer._sharded.comm._underway


@case
def chunks_in_anomaly_mode(comm):
    """It looks for NaN in the gradients that are handed on, which may be rows that are still to arrive."""
    layer = make_layer()
    layer.shard_experts(MPI.COMM_WORLD, "mpi", ep_chunks=3)
    x, _, cuts = make_tokens([5] * comm.size)
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    try:
        with torch.autograd.set_detect_anomaly(True):
            layer(x[cuts[comm.rank]])[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(layer.w_up.grad).all()


@case
def chunks_with_projections(comm):
    with pytest.raises(ConfigError, match="ep_chunks=2 with latent_dim=9"):
        make_layer(latent_dim=9).shard_experts(MPI.COMM_WORLD, "mpi", ep_chunks=2)


@case
def memory_is_let_go(comm):
    """Backward frees what forward kept, as torch's own operations do."""
    for chunks in (1, 2):
        check_memory(comm, chunks)


def check_memory(comm, chunks):
    layer = make_layer(torch.float32)
    layer.shard_experts(MPI.COMM_WORLD, "mpi", ep_chunks=chunks)
    x, _, cuts = make_tokens([4] * comm.size, torch.float32)
    output, losses = layer(x[cuts[comm.rank]])
    total = output.sum() + sum(losses.values())
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()
