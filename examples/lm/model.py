"""A decoder-only transformer on bytes whose feed-forward blocks are mixtures of experts."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffmoe_torch import MoELayer

VOCABULARY = 256


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; ``hidden`` is the width inside one expert."""

    width: int
    layers: int
    heads: int
    context: int
    experts: int
    top_k: int
    hidden: int
    dense: bool
    aux_loss_coeff: float = 0.001


class ByteModel(nn.Module):
    """tokens int64 [B, C] -> (logits [B, C, 256], sum of the layers' load-balance losses)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        angles = rotary_angles(config.context, config.width // config.heads)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        rotary = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        aux_loss = x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            x, losses = block(x, rotary)
            aux_loss = aux_loss + sum(losses.values())
        return F.linear(self.norm(x), self.embedding.weight), aux_loss

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The mixtures, in order; none in the dense twin."""
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoELayer)]

    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, on all ranks, and those at work for one token: of the experts only the top-k."""
        total = sum(parameter.numel() for parameter in self.parameters())
        idle = 0
        for layer in self.moe_layers:
            here = len(layer.w_up)
            an_expert = (layer.w_up.numel() + layer.w_down.numel()) // here
            total += (layer.num_experts - here) * an_expert
            idle += (layer.num_experts - layer.top_k) * an_expert
        return total, total - idle


class Block(nn.Module):
    """Attention, then the feed-forward block; each on a normalised input, added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.feed_forward_norm = nn.RMSNorm(config.width)
        if config.dense:
            self.feed_forward = DenseFeedForward(config.width, config.top_k * config.hidden)
        else:
            self.feed_forward = MoELayer(
                d_model=config.width,
                ffn_dim=2 * config.hidden,
                num_experts=config.experts,
                top_k=config.top_k,
                aux_loss_coeff=config.aux_loss_coeff,
            )

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x = x + self.attention(self.attention_norm(x), rotary)
        output, losses = self.feed_forward(self.feed_forward_norm(x))
        return x + output, losses


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        B, C, H = x.shape
        q, k, v = self.qkv(x).view(B, C, 3, self.heads, H // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q, *rotary), rotate(k, *rotary), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, C, H))


class DenseFeedForward(nn.Module):
    """The mixture's dense twin: one GLU block as wide inside as a token's top-k experts together."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up), {}


def rotary_angles(context: int, head_width: int) -> Tensor:
    """The angle of each position and pair of channels: float32 [context, head_width / 2]."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_width, 2) / head_width)
    return torch.arange(context)[:, None] * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs of x [B, heads, C, head_width] by their positions' angles."""
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).type_as(x)
