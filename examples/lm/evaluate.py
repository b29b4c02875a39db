"""What a model knows of each domain, and which experts it uses there."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Corpus
from .model import VOCABULARY, ByteModel
from .run import autocast

HELD_OUT_BYTES = 16 * 1024  # of each domain


@dataclass
class Evaluation:
    """``bits`` a held-out byte, by domain; ``load``: rows an expert, float64 [layers, domains, experts]."""

    bits: list[float]
    load: Tensor

    @property
    def mean_bits(self) -> float:
        return sum(self.bits) / len(self.bits)


@torch.no_grad()
def evaluate(model: ByteModel, corpus: Corpus, context: int, device: torch.device) -> Evaluation:
    """Run the held-out text of each domain by itself, so that the layers count its rows alone."""
    bits, loads = [], []
    for windows in corpus.held_out(context, max(1, HELD_OUT_BYTES // context)):
        tokens = windows.to(device)
        with autocast(device):
            logits, _ = model(tokens[:, :-1])
        nats = F.cross_entropy(logits.float().view(-1, VOCABULARY), tokens[:, 1:].reshape(-1))
        bits.append(nats.item() / math.log(2))
        loads += [layer.stats().tokens_per_expert.cpu().double() for layer in model.moe_layers]
    experts = len(loads[0]) if loads else 0
    load = torch.stack(loads) if loads else torch.zeros(0, dtype=torch.float64)
    return Evaluation(bits, load.view(len(bits), len(model.moe_layers), experts).transpose(0, 1))


def shares_by_domain(load: Tensor) -> Tensor:
    """The share of each domain's rows that an expert takes: [..., domains, experts], rows sum to 1."""
    return load / load.sum(-1, keepdim=True)


def mutual_information(load: Tensor) -> Tensor:
    """Bits that the expert of a row tells about its domain, each domain weighing the same: [layers].

    0 where every domain uses the experts alike; log2(domains) where no two domains share one.
    """
    shares = shares_by_domain(load)
    mean = shares.mean(-2, keepdim=True)
    return torch.xlogy(shares, shares / mean).nan_to_num().sum(-1).mean(-1) / math.log(2)


@torch.no_grad()
def first_choices(model: ByteModel, tokens: Tensor, device: torch.device) -> Tensor:
    """The heaviest expert of every byte in every layer: tokens int64 [n, C] -> int64 [layers, n, C]."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0] @ layer.gate.weight.T))
        for layer in model.moe_layers
    ]
    try:
        model(tokens.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([logits.argmax(-1).cpu() for logits in seen])
