"""What a layer's last forward call did with its rows, read only when asked."""

from functools import cached_property

import torch
from torch import Tensor

from ffmoe_core import routing_layout


def tokens_per_expert(routing: Tensor, num_experts: int) -> Tensor:
    """int32 [E]: rows routed to each expert, a view of the block that ``ffmoe::moe`` returns."""
    return routing[-4 * num_experts :].view(torch.int32)  # its last field


class MoEStats:
    """Statistics of one forward call, over its valid tokens.

    Nothing is computed and the device is not waited for until an attribute is read; ``tokens_per_expert``
    stays on the device and waits for nothing at all.
    """

    def __init__(self, routing: Tensor, losses: Tensor, num_experts: int) -> None:
        """``routing`` and ``losses`` are those of ``ffmoe::moe``."""
        self._routing = routing
        self._losses = losses
        self._num_experts = num_experts

    @property
    def tokens_per_expert(self) -> Tensor:
        """int32 [E], on the layer's device: rows routed to each expert, before any was dropped."""
        return tokens_per_expert(self._routing, self._num_experts)

    @property
    def dropped(self) -> int:
        """(token, expert) pairs that were over an expert's bound and got no row."""
        counts, offsets = self._host_counts
        return int(counts.sum() - offsets[-1])

    @property
    def load_imbalance(self) -> float:
        """Rows of the busiest expert over the mean; 1.0 is balanced, and stands for no rows at all."""
        counts, _ = self._host_counts
        total = int(counts.sum())
        return int(counts.max()) * self._num_experts / total if total else 1.0

    @property
    def router_entropy(self) -> float:
        """Mean entropy of the tokens' normalised scores over all experts, in nats; log(E) is uniform."""
        return float(self._losses[2])

    @cached_property
    def _host_counts(self) -> tuple[Tensor, Tensor]:
        """Rows of each expert, and expert_offsets. Waits for the device."""
        # the block of a call without tokens holds just these two, as the end of any block does
        fields = self._routing[-routing_layout(0, 1, self._num_experts).nbytes :].cpu()
        counts = tokens_per_expert(fields, self._num_experts)
        return counts, fields[: -counts.nbytes].view(torch.int32)

    def __repr__(self) -> str:
        return (
            f"MoEStats(tokens_per_expert={self.tokens_per_expert.tolist()}, dropped={self.dropped}, "
            f"load_imbalance={self.load_imbalance:.3f}, router_entropy={self.router_entropy:.3f})"
        )
