"""What a sharded layer keeps for backward: under hooks that copy it, and when a recomputation stops early."""

import contextlib

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import ffmoe_torch.layer
from ffmoe_core.comm.local import LocalCommunicator
from ffmoe_torch import MoELayer
from ffmoe_torch.dense_glu import start_glu
from ffmoe_torch.shared_expert import BesideExchanges


class Recording(LocalCommunicator):
    """A group of one that knows of what failed, and of what nobody has waited for."""

    def __init__(self):
        super().__init__()
        self.aborted = []
        self.underway = 0

    def all_to_all_v(self, *arguments):
        self.underway += 1
        return super().all_to_all_v(*arguments)

    def wait(self):
        self.underway -= 1

    def abort(self, reason):
        self.aborted.append(reason)


class AtOnce(BesideExchanges):
    """In parts, as on a GPU."""

    def start(self, spared):
        expert = self._expert
        self._launch_rest = start_glu(self._x, expert.w_up, expert.w_down, expert.activation, spared)


class WholeAtOnce(BesideExchanges):
    """As a module with hooks, which is called as a whole."""

    def start(self, spared):
        output = self._expert(self._x)
        self._launch_rest = lambda: output


def test_hooks_that_copy_what_is_saved_change_nothing():
    """As save_on_cpu and offloading do: the group's counts are there after the tensors are saved."""
    torch.manual_seed(0)
    layer = MoELayer(8, 8, 4, 2, aux_loss_coeff=0.5, z_loss_coeff=0.1)
    layer.shard_experts(Recording())
    x = torch.randn(64, 8)
    gradients = []
    for hooks in (contextlib.nullcontext(), saved_tensors_hooks(torch.clone, lambda saved: saved)):
        with hooks:
            _, losses = layer(x)
        gradients.append(torch.autograd.grad(sum(losses.values()), layer.gate.weight)[0])
    assert gradients[0].any()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("beside", [AtOnce, WholeAtOnce])
def test_a_recomputation_may_stop_in_the_shared_expert(monkeypatch, beside):
    """Where nothing that comes after it wants a gradient: which is no failure of this rank."""
    monkeypatch.setattr(ffmoe_torch.layer, "BesideExchanges", beside)
    comm = Recording()
    torch.manual_seed(0)
    layer = MoELayer(8, 8, 4, 2, num_shared_experts=1)
    layer.shard_experts(comm)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("shared" in name)
    shared, x = list(layer.shared_expert.parameters()), torch.randn(64, 8)
    gradients = [
        torch.autograd.grad(run(x)[0].sum(), shared)
        for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False))
    ]
    assert not comm.aborted
    assert comm.underway == 0
    assert all(map(torch.equal, *gradients))


def test_the_other_ranks_hear_of_a_failure_in_the_shared_expert(monkeypatch):
    """In either part of it."""

    def fail(*_):
        raise ValueError("no")

    for part in ("start", "finish"):
        failing = type("Failing", (BesideExchanges,), {part: fail})
        monkeypatch.setattr(ffmoe_torch.layer, "BesideExchanges", failing)
        comm = Recording()
        layer = MoELayer(8, 8, 4, 2, num_shared_experts=1)
        layer.shard_experts(comm)
        with pytest.raises(ValueError, match="no"):
            layer(torch.randn(6, 8))
        assert comm.aborted == ["ValueError: no"]
