"""MoEConfig: what the routed part of a layer computes, checked once."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .errors import ConfigError

ACTIVATIONS = ("swiglu", "geglu", "relu_squared")
GATINGS = ("softmax", "sigmoid")
DROP_POLICIES = ("position", "probs")
MAX_EXPERTS = 1024
MOST = 2**31 - 1  # of anything that is counted


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Options of a routed mixture-of-experts layer.

    Parameters
    ----------
    d_model : width H of a token.
    ffn_dim : gate and up rows stacked, 2*I; even.
    num_experts : E, 1 to 1024.
    top_k : K experts a token, 1 to E.
    activation : "swiglu" (silu(gate)*up), "geglu" (tanh-approximated gelu(gate)*up) or
        "relu_squared" (relu(gate)^2*up).
    gating : "softmax" or "sigmoid": how a logit becomes a score.
    norm_topk_prob : normalise the K selected scores to sum 1; False keeps the full scores.
    routed_scaling_factor : multiplies every weight.
    num_expert_groups, topk_groups : group-limited routing. The experts form ``num_expert_groups``
        consecutive groups of equal size; a group scores the sum of its top 2 experts, and only experts
        of the best ``topk_groups`` groups can be selected. Both or neither.
    capacity_factor : an expert takes at most ceil(capacity_factor*T*K/E) rows of a call with T tokens;
        None is dropless.
    max_tokens_per_expert : a hard bound on an expert's rows; None is no bound.
    allow_dropped_tokens : False turns an overflow of either bound into a CapacityError.
    drop_policy : which rows an overfull expert keeps: its first in token order ("position") or its
        heaviest ("probs").
    aux_loss_coeff : coefficient of the Switch load-balance loss (Fedus et al. 2021, eq. 4).
    z_loss_coeff : coefficient of the router z-loss (Zoph et al. 2022, eq. 5).
    recompute_activations : keep nothing of the experts' inside for backward; recompute it there.

    Raises
    ------
    ConfigError : a value is out of range or unknown; the message names the option and what would work.
    """

    d_model: int
    ffn_dim: int
    num_experts: int
    top_k: int
    activation: str = "swiglu"
    gating: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_expert_groups: int | None = None
    topk_groups: int | None = None
    capacity_factor: float | None = None
    max_tokens_per_expert: int | None = None
    allow_dropped_tokens: bool = True
    drop_policy: str = "position"
    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0
    recompute_activations: bool = False

    def __post_init__(self) -> None:
        _check_int("d_model", self.d_model, 1)
        _check_int("ffn_dim", self.ffn_dim, 2)
        if self.ffn_dim % 2:
            raise ConfigError(
                f"ffn_dim={self.ffn_dim} is odd: it counts gate and up rows stacked, so it must be even"
            )
        _check_int("num_experts", self.num_experts, 1, MAX_EXPERTS)
        _check_int("top_k", self.top_k, 1, self.num_experts, "num_experts")
        for name in ("norm_topk_prob", "allow_dropped_tokens", "recompute_activations"):
            _check_bool(name, getattr(self, name))
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("gating", self.gating, GATINGS)
        _check_choice("drop_policy", self.drop_policy, DROP_POLICIES)
        lowest = {"routed_scaling_factor": None, "aux_loss_coeff": 0.0, "z_loss_coeff": 0.0}
        if self.capacity_factor is not None:
            lowest["capacity_factor"] = None
        for name, low in lowest.items():
            value = getattr(self, name)
            check_float(name, value, low)
            # of NumPy's own kind of float neither compilers nor its repr make a number
            object.__setattr__(self, name, float(value))
        self._check_groups()
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ConfigError(f"capacity_factor={self.capacity_factor} must be above 0, or None for dropless")
        if self.max_tokens_per_expert is not None:
            _check_int("max_tokens_per_expert", self.max_tokens_per_expert, 1)

    def _check_groups(self) -> None:
        groups, best = self.num_expert_groups, self.topk_groups
        if (groups is None) != (best is None):
            raise ConfigError(
                f"num_expert_groups={groups} and topk_groups={best} go together: give both or neither"
            )
        if groups is None or best is None:
            return
        _check_int("num_expert_groups", groups, 1, self.num_experts, "num_experts")
        if self.num_experts % groups:
            raise ConfigError(f"num_expert_groups={groups} does not divide num_experts={self.num_experts}")
        _check_int("topk_groups", best, 1, groups, "num_expert_groups")
        reachable = best * (self.num_experts // groups)
        if self.top_k > reachable:
            raise ConfigError(
                f"top_k={self.top_k} is more than the {reachable} experts in topk_groups={best} groups"
            )

    @property
    def intermediate(self) -> int:
        """I, the width of an expert's inside: half of ``ffn_dim``."""
        return self.ffn_dim // 2

    @property
    def keeps_logits(self) -> bool:
        """Whether backward needs the router's logits; else the weights it gave say all there is to know."""
        return needs_logits(self.gating, self.norm_topk_prob, self.aux_loss_coeff, self.z_loss_coeff)

    @property
    def sparse_gradient(self) -> bool:
        """Whether a token's logits have a gradient at the experts it was sent to alone.

        No other score is part of a weight then, and no loss looks at all of them.
        """
        alone = self.gating != "softmax" or self.norm_topk_prob
        return alone and self.aux_loss_coeff == 0 and self.z_loss_coeff == 0

    def capacity(self, num_tokens: int) -> int | None:
        """Most rows an expert may take of ``num_tokens`` tokens, or None where nothing bounds it."""
        if self.capacity_factor is None:
            return self.max_tokens_per_expert
        most = num_tokens * self.top_k
        share = min(_share(self.capacity_factor, most, self.num_experts), most)
        return share if self.max_tokens_per_expert is None else min(share, self.max_tokens_per_expert)


@lru_cache(maxsize=256)
def _share(capacity_factor: float, num_rows: int, num_experts: int) -> int:
    """ceil(capacity_factor * num_rows / num_experts) of the factor as it is written, in decimals.

    In floats 1.1 * 100 is a bit more than 110.
    """
    return math.ceil(Fraction(repr(capacity_factor)) * num_rows / num_experts)


def needs_logits(gating: str, norm_topk_prob: bool, aux_loss_coeff: float, z_loss_coeff: float) -> bool:
    """``MoEConfig.keeps_logits``, for who has the options without the widths.

    A softmax's gradient is a function of its values, and with these options the weights are such values.
    """
    return gating != "softmax" or not norm_topk_prob or aux_loss_coeff > 0 or z_loss_coeff > 0


def _check_int(name: str, value: object, low: int, high: int = MOST, high_name: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} must be an int")
    if not low <= value <= high:
        upper = f"{high_name}={high}" if high_name else high
        raise ConfigError(f"{name}={value} must be at least {low} and at most {upper}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be True or False")


def check_float(name: str, value: object, low: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise ConfigError(f"{name}={value!r} must be a finite number")
    if low is not None and value < low:
        raise ConfigError(f"{name}={value} must be at least {low:g}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown; known: {', '.join(map(repr, known))}")
