from typing import Any, NamedTuple

from .config import MoEConfig
from .plan import RoutingPlan

class Routing(NamedTuple):
    """What ``route`` returns."""

    topk_idx: Any  # int32 [T, K]; -1 for tokens that valid_mask leaves out
    topk_weights: Any  # [T, K] router dtype
    tokens_per_expert: Any  # int32 [E], before anything is dropped
    losses: Any  # [3]: aux loss, z-loss (each times its coefficient), router entropy in nats
    logits: Any  # [T, E] router dtype

def route(
    x: Any, gate_weight: Any, config: MoEConfig, *, expert_bias: Any = None, valid_mask: Any = None
) -> Routing:
    """Choose each token's K experts and their weights.

    x [T, H] of any float dtype; gate_weight [E, H], dtype of x or float32; expert_bias [E] float32 (selection
    only); valid_mask [T] bool or uint8. Logits and all that follows are float32 (float64 for float64 x).
    Ties go to the lower expert index. Aux loss: Fedus et al. 2021, eq. 4; z-loss: Zoph et al. 2022, eq. 5.

    Raises ShapeError, DTypeError, DeviceError, LayoutError for arrays that do not fit.
    """

def make_plan(
    topk_idx: Any,
    topk_weights: Any,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: str = "position",
    validate: bool = True,
) -> RoutingPlan:
    """Sort (token, expert) pairs by expert, stably.

    topk_idx [T, K] int32 in 0..E-1, or -1 for a pair that goes nowhere; topk_weights [T, K] float32 or
    float64. ``capacity`` bounds an expert's rows; an overfull one keeps its first in token order
    ("position") or its heaviest ("probs", ties to the earlier token). ``validate=False`` skips the check of
    the indices, which reads them on the host and so waits for the device.

    Raises RoutingError for an index that is no expert; ShapeError, DTypeError, DeviceError, ConfigError.
    """

def permute(x: Any, plan: RoutingPlan, *, out: Any = None) -> Any:
    """[T, H] tokens to [T*K, H] rows sorted by expert; rows that belong to nobody are zero.

    Raises ShapeError, DTypeError, DeviceError, LayoutError for arrays that do not fit.
    """

def combine(rows: Any, plan: RoutingPlan, *, weighted: bool = True, out: Any = None) -> Any:
    """[T*K, H] rows to [T, H] tokens: each token's rows summed in the order of its K experts.

    Weighted by ``plan.topk_weights`` (whose dtype is float64 for float64 rows, else float32), or plainly.
    Dropped pairs add nothing. Accumulates in float32 (float64).

    Raises ShapeError, DTypeError, DeviceError, LayoutError for arrays that do not fit.
    """

def grouped_gemm(
    a: Any,
    b: Any,
    expert_offsets: Any,
    *,
    row_index: Any = None,
    transpose_b: bool = True,
    out: Any = None,
    validate: bool = True,
) -> Any:
    """One product for each group of rows: ``out[r] = a[r] @ b[e].T`` for r in group e.

    a [rows, K]; b [E, N, K] (``transpose_b``) or [E, K, N], dtype of a; expert_offsets [E+1] int32: group e
    is rows ``expert_offsets[e]:expert_offsets[e+1]`` of the [R, N] result; rows past the last group are
    zero. row_index [R] int32: row r of the product reads ``a[row_index[r]]``. Accumulates in float32
    (float64). ``validate=False`` skips the check of offsets and indices, which waits for the device.

    Raises RoutingError for offsets or indices out of range; ShapeError, DTypeError, DeviceError, LayoutError.
    """

def grouped_gemm_wgrad(
    a: Any,
    b: Any,
    expert_offsets: Any,
    *,
    a_index: Any = None,
    b_index: Any = None,
    out: Any = None,
    accumulate: bool = False,
    validate: bool = True,
) -> Any:
    """The weight-gradient twin: contracts each group's rows, ``out[e] = sum over r of outer(a[r], b[r])``.

    a [rows, M], b [rows, N] of one dtype; a_index, b_index [R] int32: row r reads ``a[a_index[r]]``. The
    result is [E, M, N]; groups without rows give zeros. ``out`` may have the dtype of a or float32 (float64
    for float64), into which the sums go without rounding; ``accumulate=True`` adds them to what ``out`` holds.
    See ``grouped_gemm`` for the rest.

    Raises ConfigError for ``accumulate=True`` without ``out``.
    """
