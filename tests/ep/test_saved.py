"""What a sharded layer keeps for backward: under hooks that copy it, and when a recomputation stops early."""

import contextlib

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import ffmoe_torch.layer
from ffmoe_core.comm.local import LocalCommunicator
from ffmoe_torch import MoELayer


class Recording(LocalCommunicator):
    """A group of one that knows of what failed."""

    def __init__(self):
        super().__init__()
        self.aborted = []

    def abort(self, reason):
        self.aborted.append(reason)


def at_once(expert, x):
    """In the place of the layer's ``beside``: computed when it is started, as on a GPU."""

    def start():
        output = expert(x)
        return lambda: output

    return start


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


def test_a_recomputation_may_stop_in_the_shared_expert(monkeypatch):
    """Where nothing that comes after it wants a gradient: which is no failure of this rank."""
    monkeypatch.setattr(ffmoe_torch.layer, "beside", at_once)
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
    assert all(map(torch.equal, *gradients))
