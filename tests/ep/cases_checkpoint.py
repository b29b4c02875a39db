"""Cases for four ranks: a model that goes on from a checkpoint, on other ranks, is the one that never stopped."""

import tempfile
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mpi4py import MPI
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ffmoe_core import expert_range
from ffmoe_core.comm import Step
from ffmoe_core.errors import UnsupportedError
from ffmoe_torch import clip_grad_norm_, ddp_ignored, get_dense_params, shard_experts
from ffmoe_torch.checkpoint import ExpertShard, ShardedState
from tests.ep.cases_torch import Model, check_state, expert_parameters, gloo, make_layer, make_tokens, train

EXPERTS = 5  # which torch would cut into 2, 2, 1 and 0 for four ranks
TOKENS = 24
ARRANGEMENTS = {  # ranks, how many of them make a group, and what is done with the dense parameters
    "one process": (1, None, None),
    "a group of one": (1, 1, "ddp"),
    "two ranks": (2, 2, "ddp"),
    "three ranks": (3, 3, "ddp"),
    "four ranks": (4, 4, "ddp"),
    "four ranks, fsdp": (4, 4, "fsdp"),
    "two by two ranks, fsdp": (4, 2, "fsdp"),
}
CASES = {}


@cache
def first_ranks(comm, size):
    """The process group of the first ranks; all make it."""
    gloo(comm)
    return dist.new_group(range(size))


@cache
def mesh_of(comm):
    gloo(comm)
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "ep"))


def shared_folder(comm):
    return comm.gather(tempfile.mkdtemp() if comm.rank == 0 else "", Step("folder of a test"))[0]


def make_model():
    torch.manual_seed(0)
    # losses would be those of a group
    return Model(num_experts=EXPERTS, aux_loss_coeff=0.0, z_loss_coeff=0.0)


def optimizer_of(model):
    groups = [
        {"params": get_dense_params(model)},
        {"params": expert_parameters(model), "weight_decay": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


class Run:
    """A model and its optimizer, spread over the first ``size`` ranks, this one among them."""

    def __init__(self, comm, size, ep_size, dense):
        mesh, self.ranks, self.replicas = mesh_of(comm), first_ranks(comm, size), None
        self.model = self.forward = make_model()
        self.cut = slice(comm.rank * TOKENS // size, (comm.rank + 1) * TOKENS // size)
        self.experts = expert_range(EXPERTS, ep_size or 1, comm.rank % (ep_size or 1))
        if ep_size is not None:
            ep_group = self.ranks
            if ep_size < size:
                ep_group, self.replicas = mesh.get_group("ep"), mesh.get_group("replica")
            shard_experts(self.model, ep_group, "torch")
        if dense == "ddp":
            ignored = ddp_ignored(self.model)
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, ignored)
            self.forward = DistributedDataParallel(self.model, process_group=self.ranks)
        elif dense == "fsdp":
            everyone, ignored = mesh._flatten(), set(expert_parameters(self.model))
            for block in (*self.model.layers, self.model):
                fully_shard(block, mesh=everyone, ignored_params=ignored)
        self.optimizer = optimizer_of(self.model)
        self.state = {"training": ShardedState(self.forward, self.optimizer)}

    def save(self, folder):
        dcp.save(self.state, checkpoint_id=folder, process_group=self.ranks)

    def load(self, folder):
        """In place of all that the model and the optimizer started with."""
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                tensor.fill_(3)
        self.optimizer.param_groups[1]["weight_decay"] = 0.5
        dcp.load(self.state, checkpoint_id=folder, process_group=self.ranks)

    def train(self):
        x, target, _ = make_tokens([TOKENS])
        x, target = x[self.cut], target[self.cut]
        return train(self.model, x, target, self.between, self.forward, self.optimizer)

    def between(self):
        """Between the gradients and the optimizer's step."""
        if self.replicas is not None:
            for weight in expert_parameters(self.model):
                dist.all_reduce(weight.grad, group=self.replicas)
                weight.grad /= 2
            for layer in self.model.layers:
                dist.all_reduce(layer.expert_counts, group=self.replicas)
        return clip_grad_norm_(self.model, 0.5)


@cache
def never_stopped():
    """One process: the norms of gradients in the second half, and the state after it."""
    x, target, _ = make_tokens([TOKENS])
    model = make_model()
    optimizer = optimizer_of(model)
    for _ in range(2):
        norms = train(model, x, target, lambda: clip_grad_norm_(model, 0.5), model, optimizer)
    return norms, model.state_dict()


def check(comm, first, second):
    """Train in one arrangement, go on in another."""
    folder = shared_folder(comm)
    for arrangement in (first, second):
        first_ranks(comm, arrangement[0]), mesh_of(comm)
    if comm.rank < first[0]:
        run = Run(comm, *first)
        run.train()
        run.save(folder)
    comm.barrier(Step("saved"))
    if comm.rank < second[0]:
        run = Run(comm, *second)
        run.load(folder)
        norms, (wanted, state) = run.train(), never_stopped()
        assert norms == pytest.approx(wanted, rel=1e-9)
        check_state(run.model.state_dict(), state, run.experts)


_PATHS = {
    "one process": ["two ranks"],
    "two ranks": [*ARRANGEMENTS],
    "four ranks": ["one process", "two ranks"],
    "two by two ranks, fsdp": ["one process", "three ranks", "four ranks, fsdp"],
}
for _first, _seconds in _PATHS.items():
    for _second in _seconds:

        def _run(comm, first=ARRANGEMENTS[_first], second=ARRANGEMENTS[_second]):
            check(comm, first, second)

        CASES[f"from {_first} to {_second}"] = _run


def case(function):
    CASES[function.__name__.replace("_", " ")] = function
    return function


@case
def saved_in_the_background(comm):
    """What async_save stages keeps on telling which experts it is."""
    gloo(comm)
    folder, layer, whole = (
        shared_folder(comm),
        make_layer(num_experts=EXPERTS),
        make_layer(num_experts=EXPERTS),
    )
    model = nn.Sequential(layer)
    shard_experts(model, dist.group.WORLD, "torch")
    saving = dcp.async_save(ShardedState(model).state_dict(), checkpoint_id=folder)
    saving.result()
    loaded = nn.Sequential(make_layer(num_experts=EXPERTS))
    with torch.no_grad():
        loaded[0].w_up.zero_()
    dcp.load(ShardedState(loaded).state_dict(), checkpoint_id=folder)  # into the parameters themselves
    assert torch.equal(loaded[0].w_up, whole.w_up)


@case
def what_a_state_holds(comm):
    gloo(comm)
    model = nn.Sequential(make_layer(torch.bfloat16, num_experts=EXPERTS))
    shard_experts(model, dist.group.WORLD, "torch")
    state = ShardedState(model).state_dict()["model"]
    kinds = {name: type(value) for name, value in state.items()}
    marked = {"0.w_up", "0.w_down"}
    assert {name for name, kind in kinds.items() if kind is ExpertShard} == marked
    assert {kinds[name] for name in kinds.keys() - marked} == {torch.Tensor}
    assert state["0.w_up"].experts.data_ptr() == model[0].w_up.data_ptr()
    assert "experts: tensor" in repr(state["0.w_up"])
    with pytest.raises(UnsupportedError, match="saved and loaded"):
        state["0.w_up"] + 1
    (item,) = state["0.w_up"].__create_write_items__("0.w_up", state["0.w_up"])
    assert item.tensor_data.size == (EXPERTS, *model[0].w_up.shape[1:])
    assert item.tensor_data.properties.dtype == torch.bfloat16
    assert {type(value) for value in model.state_dict().values()} == {torch.Tensor}  # outside, as ever


@case
def what_cannot_be_saved(comm):
    gloo(comm)
    model = nn.Sequential(make_layer(num_experts=EXPERTS))
    shard_experts(model, dist.group.WORLD, "torch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].w_up]["blocks"] = torch.zeros(17)
    optimizer.state[model[0].w_down]["blocks"] = torch.zeros(())
    with pytest.raises(UnsupportedError, match=r"blocks of 0\.w_up has shape \(17,\)"):
        ShardedState(model, optimizer).state_dict()
    dist.barrier()
    dist.destroy_process_group()  # the last case
    over_mpi = make_layer()
    over_mpi.shard_experts(MPI.COMM_WORLD, "mpi")
    with pytest.raises(UnsupportedError, match="full_state_dict"):
        ShardedState(over_mpi).state_dict()
