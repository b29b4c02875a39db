"""In which order a sharded layer's call launches its work: nothing that can come later stands before the products."""

import pytest
import torch

import ffmoe_torch.layer
from ffmoe_core import ExpertParallel
from ffmoe_core.backend import STAGES
from ffmoe_core.comm.local import LocalCommunicator
from ffmoe_core.cpu.backend import CpuBackend
from ffmoe_torch import MoELayer, dense_glu
from ffmoe_torch.dense_glu import start_glu
from ffmoe_torch.shared_expert import BesideExchanges

PARTS = ("start", "arrive", "finish", "join")


class Logging(LocalCommunicator):
    """A group of one that says when an exchange starts, and when the host asks for the counts."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def all_to_all_v(self, space, parts, send_counts, recv_counts, step):
        self.log.append(step.name)
        return super().all_to_all_v(space, parts, send_counts, recv_counts, step)

    def all_reduce(self, space, parts, step):
        self.log.append(step.name)
        return super().all_to_all_v(space, parts, [1], [1], step)

    def read(self, space, array, step):
        reading = super().read(space, array, step)

        def finish():
            self.log.append("counts are there")
            return reading()

        return finish


def told(log, function, name):
    """``function``, that says it was called."""

    def call(*arguments):
        log.append(name)
        return function(*arguments)

    return call


def sharded_layer(log, monkeypatch, beside):
    """A layer with a shared expert that says what it launches. Its shared expert alone fills arrays."""
    for stage in STAGES:
        monkeypatch.setattr(CpuBackend, stage, staticmethod(told(log, getattr(CpuBackend, stage), stage)))
    monkeypatch.setattr(ffmoe_torch.layer, "BesideExchanges", beside)
    layer = MoELayer(8, 8, 4, 2, num_shared_experts=1, aux_loss_coeff=0.1)
    layer.shard_experts(Logging(log))
    return layer


@pytest.fixture
def log(monkeypatch):
    """What a forward call launches, in order."""
    log = []
    parts = {name: told(log, getattr(BesideExchanges, name), f"shared expert: {name}") for name in PARTS}
    layer = sharded_layer(log, monkeypatch, type("Told", (BesideExchanges,), parts))
    layer(torch.randn(6, 8))
    return log


def test_nothing_that_can_wait_stands_between_the_counts_and_the_first_product(log):
    first = log.index("counts are there")
    assert log[first + 1 : log.index("grouped_glu")] == ["dispatch", "sort", "shared expert: arrive"]


def test_tokens_are_packed_and_the_shared_expert_begins_while_the_host_is_at_the_counts(log):
    asked = log.index("counts")
    assert log[asked + 1 : log.index("counts are there")] == ["permute", "shared expert: start"]


def test_the_losses_come_last(log):
    # the experts' sums, their way home, and the tokens' sums are called the same
    assert log[log.index("grouped_gemm") + 1 :] == [
        "combine",
        "combine",
        "shared expert: finish",
        "losses",
        "combine",
        "router_losses",
        "shared expert: join",
    ]


def test_a_communicator_may_be_a_proxy_of_one():
    class Proxy:
        def __init__(self, comm):
            self.comm = comm

        def __getattr__(self, name):
            return getattr(self.comm, name)

    layer = MoELayer(8, 8, 4, 2)
    layer.shard_experts(Proxy(LocalCommunicator()))
    layer(torch.randn(3, 8))


class OnTheRuntime(BesideExchanges):
    """The kernels of a GPU's shared expert, launched when they are there."""

    def start(self, spared):
        expert = self._expert
        self._launch_rest = start_glu(self._x, expert.w_up, expert.w_down, expert.activation, spared)


def test_the_tokens_sums_take_in_what_the_shared_expert_has_given(monkeypatch):
    """In the same pass over memory; and its gradient is the output's."""
    layer = sharded_layer([], monkeypatch, OnTheRuntime)
    layer.requires_grad_(False)
    x = torch.randn(6, 8)
    added = []
    finish_combine = ExpertParallel.finish_combine

    def watched(*arguments, **options):
        added.append(options["added"])
        return finish_combine(*arguments, **options)

    monkeypatch.setattr(ExpertParallel, "finish_combine", watched)
    monkeypatch.setattr(OnTheRuntime, "join", None)
    expert = layer.shared_expert.requires_grad_(True)
    output, _ = layer(x)
    torch.testing.assert_close(added[0], expert(x))
    layer.shared_expert.w_down.grad = None
    grad = torch.randn_like(output)
    got = torch.autograd.grad(output, list(expert.parameters()), grad)
    want = torch.autograd.grad(expert(x), list(expert.parameters()), grad)
    torch.testing.assert_close(got, want)


def test_no_exchange_begins_that_nobody_waits_for(monkeypatch):
    """A backward that asks for the shared expert's gradients alone sends none to the experts."""
    log = []
    layer = sharded_layer(log, monkeypatch, OnTheRuntime)
    output, _ = layer(torch.randn(6, 8))
    parameters = list(layer.shared_expert.parameters())
    torch.autograd.grad(output.sum(), parameters, retain_graph=True)
    assert "combine backward" not in log
    output.sum().backward()
    assert log.count("combine backward") == 1


@pytest.mark.parametrize(("shape", "dtype"), [((1, 8), torch.float32), ((6, 8), torch.float64)])
def test_what_the_sum_cannot_take_in_is_added_to_it(monkeypatch, shape, dtype):
    """Another module's output in the place of the shared expert's, as torch adds it."""
    given = torch.zeros(shape, dtype=dtype)

    class Another(BesideExchanges):
        def start(self, spared):
            self._launch_rest = lambda: given

    layer = sharded_layer([], monkeypatch, Another)
    x = torch.randn(6, 8)
    routed, _ = layer(x)
    given = torch.full(shape, 3.0, dtype=dtype)
    output, _ = layer(x)
    assert output.dtype == dtype
    assert torch.equal(output, routed + given)


def test_in_backward_the_shared_expert_comes_after_the_exchange_that_it_runs_beside(monkeypatch):
    log = []
    layer = sharded_layer(log, monkeypatch, OnTheRuntime)
    output, _ = layer(torch.randn(6, 8))
    log.clear()
    output.sum().backward()
    down = ["fill", "fill", "fill", "grouped_glu_backward", "grouped_gemm_wgrad"]
    up = ["fill", "fill", "grouped_gemm_wgrad"]  # nobody asked for x's gradient
    first = log.index("combine backward") + 1
    assert log[first : first + len(down)] == down
    experts = log[first + len(down) :]
    assert experts[0] == "grouped_glu_backward"
    second = experts.index("fill")
    assert experts[second : second + len(up)] == up
    assert "grouped_gemm" in experts[:second]
    assert "dispatch backward" in experts[second:]


def test_the_shared_expert_leaves_an_exchange_its_multiprocessors(monkeypatch):
    """Where one is under way: the up-projection's gradients come after it."""
    log = []
    monkeypatch.setattr(Logging, "multiprocessors", 3)
    asked = []

    def watched(name):
        function = getattr(dense_glu, name)

        def call(*arguments, **options):
            asked.append((name, options.get("spared", 0), options.get("spared_flop", 0)))
            return function(*arguments, **options)

        return call

    names = ["glu_up", "glu_down", "glu_down_backward", "glu_up_backward"]
    for name in names:
        monkeypatch.setattr(dense_glu, name, watched(name))
    layer = sharded_layer(log, monkeypatch, OnTheRuntime)
    layer(torch.randn(6, 8))[0].sum().backward()
    # nothing crosses to another rank
    assert asked == [*((name, 3, 0.0) for name in names[:3]), (names[3], 0, 0)]


def test_nothing_waits_for_an_exchange_before_what_runs_beside_it(monkeypatch):
    log = []
    monkeypatch.setattr(Logging, "wait", lambda self: log.append("wait"))
    layer = sharded_layer(log, monkeypatch, OnTheRuntime)
    output, _ = layer(torch.randn(6, 8))

    def beside(exchange):
        start = log.index(exchange)
        return log[start + 1 : log.index("wait", start)]

    home = len(log) - log[::-1].index("grouped_gemm")  # behind the shared expert's, the last
    assert log[:home].count("combine") == 2  # of the experts' rows, and their way home
    assert "wait" not in log[log.index("combine") : home]
    log.clear()
    output.sum().backward()
    assert beside("combine backward")[-2:] == ["grouped_glu_backward", "grouped_gemm_wgrad"]
