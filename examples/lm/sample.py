"""Text written by the model."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .model import ByteModel
from .run import autocast

TEMPERATURE = 0.8


@torch.no_grad()
def write(model: ByteModel, prompts: Tensor, count: int, context: int, seed: int) -> Tensor:
    """Continue prompts [n, P] by ``count`` bytes each: int64 [n, count]."""
    generator = torch.Generator().manual_seed(seed)
    text = prompts
    for _ in range(count):
        with autocast(text.device):
            logits, _ = model(text[:, -context:])
        likely = (logits[:, -1].float() / TEMPERATURE).softmax(-1).cpu()
        following = torch.multinomial(likely, 1, generator=generator).to(text.device)
        text = torch.cat([text, following], dim=1)
    return text[:, prompts.shape[1] :]


def as_text(tokens: Iterable[int]) -> str:
    """Bytes as text; what is no UTF-8 shows as U+FFFD."""
    return bytes(tokens).decode(errors="replace")
