"""Cases for every rank, with a GPU of its own: a sharded MoELayer over NCCL is the layer of one process."""

import time
from functools import partial
from unittest import mock

import torch
from mpi4py import MPI

import ffmoe_torch.layer
from ffmoe_torch.shared_expert import BesideExchanges
from tests.ep.cases_torch import (
    OPTIONS,
    check_layer,
    data_parallel_training,
    gloo,
    make_layer,
    make_tokens,
)
from tests.torch.checks import results, same

check = partial(check_layer, backend="nccl", device="cuda")
CASES = {}


def uneven(size):
    return [5 + 4 * rank for rank in range(size)]


for _name, _options in OPTIONS.items():

    def _run(comm, options=_options):
        check(comm, counts=uneven(comm.size), **options)

    CASES[_name] = _run

for _name, _counts in {
    "a rank without tokens": lambda ranks: [0, *[9] * (ranks - 1)],
    "one token in all": lambda ranks: [0] * (ranks - 1) + [1],
    "no tokens at all": lambda ranks: [0] * ranks,
}.items():

    def _run(comm, counts=_counts):
        check(comm, counts=counts(comm.size), latent_dim=9)

    CASES[_name] = _run

for _dtype in (torch.float32, torch.bfloat16, torch.float16):
    for _chunks in (1, 3):

        def _run(comm, dtype=_dtype, chunks=_chunks):
            counts = [150 + 70 * rank for rank in range(comm.size)]
            check(comm, counts=counts, dtype=dtype, ep_chunks=chunks, num_shared_experts=1)

        CASES[f"{_dtype}, {_chunks} chunks"] = _run


def case(function):
    CASES[function.__name__.replace("_", " ")] = function
    return function


@case
def ranks_that_meet_in_a_process_group(comm):
    check(comm, counts=uneven(comm.size), group=gloo(comm))


@case
def data_parallel(comm):
    data_parallel_training(comm, "nccl", "cuda")


@case
def two_runs_the_same_bits(comm):
    x, _, cuts = make_tokens([300] * comm.size, torch.bfloat16)
    for chunks in (1, 3):
        runs = []
        for _ in range(2):
            layer = make_layer(torch.bfloat16, num_shared_experts=1).to("cuda")
            layer.shard_experts(MPI.COMM_WORLD, "nccl", ep_chunks=chunks)
            leaf = x[cuts[comm.rank]].to("cuda", copy=True).requires_grad_()
            runs.append(results(layer, leaf))
        assert same(*runs)


class AfterAll(BesideExchanges):
    """Launched as a whole on the caller's stream, when the rows are on their way home."""

    def start(self, spared):
        self._launch_rest = partial(self._expert, self._x)


@case
def a_graph_is_captured_beside_the_watch(comm):
    """The thread that looks after the exchanges asks the driver for events; a capture bears with that."""
    layer = make_layer(torch.float32).to("cuda")
    layer.shard_experts(MPI.COMM_WORLD, "nccl")
    x, total = torch.randn(64, 24, device="cuda"), torch.zeros(64, 24, device="cuda")
    for _ in range(3):
        wanted = layer(x)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="global"):
            time.sleep(0.2)  # of which the thread's looks are a part
            total += x
        assert same([layer(x)[0]], [wanted])
    graph.replay()
    assert same([total], [x])


@case
def a_shared_expert_on_a_stream_of_its_own(comm):
    """Begun early it is what it is after all; also where autocast makes copies, and lets go of them at once."""
    options = {"d_model": 512, "ffn_dim": 512, "num_experts": 8, "num_shared_experts": 8}
    layer = make_layer(torch.float32, **options).to("cuda")
    layer.shard_experts(MPI.COMM_WORLD, "nccl")
    torch.manual_seed(1 + comm.rank)
    x = torch.randn(2048, 512, device="cuda", requires_grad=True)

    def run(recording):
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(recording):
            output, _ = layer(x)
        if not recording:
            return [output]
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.shared_expert.parameters()])]

    for recording in (False, True):
        with mock.patch.object(ffmoe_torch.layer, "BesideExchanges", AfterAll):
            want = run(recording)
        for _ in range(10):
            assert same(run(recording), want)
            torch.full((8192, 512), float("nan"), device="cuda")  # takes what was just freed
