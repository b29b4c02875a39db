"""In which order a sharded layer's call launches its work: nothing that can come later stands before the products."""

import pytest
import torch

import ffmoe_torch.layer
from ffmoe_core.backend import STAGES
from ffmoe_core.comm.local import LocalCommunicator
from ffmoe_core.cpu.backend import CpuBackend
from ffmoe_torch import MoELayer


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


@pytest.fixture
def log(monkeypatch):
    """What a forward call of a layer with a shared expert launches, in order."""
    log = []

    def logged(name, function):
        def call(*arguments):
            log.append(name)
            return function(*arguments)

        return call

    for stage in STAGES:
        monkeypatch.setattr(CpuBackend, stage, staticmethod(logged(stage, getattr(CpuBackend, stage))))
    beside = ffmoe_torch.layer.beside
    monkeypatch.setattr(
        ffmoe_torch.layer, "beside", lambda expert, x: logged("shared expert", beside(expert, x))
    )
    layer = MoELayer(8, 8, 4, 2, num_shared_experts=1, aux_loss_coeff=0.1)
    layer.shard_experts(Logging(log))
    layer(torch.randn(6, 8))
    return log


def test_nothing_that_can_wait_stands_between_the_counts_and_the_first_product(log):
    first = log.index("counts are there")
    assert log[first + 1 : log.index("grouped_glu")] == ["dispatch", "shared expert", "sort"]


def test_the_tokens_are_packed_while_the_host_is_at_the_counts(log):
    asked = log.index("counts")
    assert log[asked + 1 : log.index("counts are there")] == ["permute"]


def test_the_losses_come_last(log):
    # the experts' sums, their way home, and the tokens' sums are called the same
    assert log[log.index("grouped_gemm") + 1 :] == [
        "combine",
        "combine",
        "losses",
        "combine",
        "router_losses",
    ]


def test_the_shared_expert_is_launched_when_the_tokens_are_on_their_way(log):
    assert log[log.index("dispatch") + 1] == "shared expert"
