"""RoutingPlan: who goes where. RoutingLayout: the same, packed into one block of bytes."""

import sys
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from .errors import ConfigError, DTypeError, ShapeError

ROUTER_DTYPES = ("float32", "float64")


class RoutingPlan(NamedTuple):
    """Where each (token, expert) pair stands among the rows sorted by expert.

    T tokens, K experts a token, E experts, R = T*K rows. Rows of expert ``e`` are
    ``expert_offsets[e]:expert_offsets[e+1]`` and stand in token order. Pairs that were dropped, or whose
    index is no expert, have ``token_rows == -1``; as many rows at the end (from ``expert_offsets[E]``)
    belong to nobody.
    """

    topk_idx: Any  # int32 [T, K]
    topk_weights: Any  # float32 (float64) [T, K]
    expert_offsets: Any  # int32 [E+1]
    row_token: Any  # int32 [R]: the token of a row
    row_weights: Any  # float32 (float64) [R]: the weight of a row
    token_rows: Any  # int32 [T, K]: the row of a pair


class Field(NamedTuple):
    offset: int  # bytes from the block's start
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class RoutingLayout:
    """Byte offsets of all that routing leaves behind, packed into one uint8 block.

    One block instead of seven arrays: a layer makes it once a call, and allocating and wrapping an
    array costs as much host time as launching a kernel.
    """

    fields: dict[str, Field]
    nbytes: int


@lru_cache(maxsize=256)
def routing_layout(
    num_tokens: int, top_k: int, num_experts: int, router_dtype: str = "float32"
) -> RoutingLayout:
    """The layout for T tokens, K experts a token, E experts; ``router_dtype`` is "float32" or "float64".

    The widest elements stand first, so that every field is aligned to its own and no byte is left over. The
    counts of experts stand last: where they are, seen from the end, does not depend on T.

    Raises ConfigError for another ``router_dtype``.
    """
    if router_dtype not in ROUTER_DTYPES:
        known = ", ".join(map(repr, ROUTER_DTYPES))
        raise ConfigError(f"router_dtype={router_dtype!r} is unknown; known: {known}")
    pairs = (num_tokens, top_k)
    rows = (num_tokens * top_k,)
    wanted = [
        ("topk_weights", pairs, router_dtype),
        ("row_weights", rows, router_dtype),
        ("topk_idx", pairs, "int32"),
        ("token_rows", pairs, "int32"),
        ("row_token", rows, "int32"),
        ("expert_offsets", (num_experts + 1,), "int32"),
        ("tokens_per_expert", (num_experts,), "int32"),
    ]
    fields, offset = {}, 0
    for name, shape, dtype in wanted:
        fields[name] = Field(offset, shape, dtype)
        offset += prod(shape) * _itemsize(dtype)
    return RoutingLayout(fields, offset)


def unpack_routing(
    routing: Any, num_tokens: int, top_k: int, num_experts: int, router_dtype: str = "float32"
) -> tuple[Any, RoutingPlan]:
    """``(tokens_per_expert [E] int32, RoutingPlan)``: views into a packed block, in the block's own kind.

    ``routing`` is the uint8 [n] array of a MoEResult (NumPy, CuPy or torch), made for the same T, K, E.

    Raises ShapeError for a block of another size, DTypeError for what is no uint8 array, ConfigError for another
    ``router_dtype``.
    """
    if str(getattr(routing, "dtype", "")) not in ("uint8", "torch.uint8"):
        given = getattr(routing, "dtype", type(routing).__name__)
        raise DTypeError(f"routing is {given}; expected a uint8 array, the routing of a MoEResult")
    framework = sys.modules[type(routing).__module__.partition(".")[0]]
    layout = routing_layout(num_tokens, top_k, num_experts, router_dtype)
    if routing.shape != (layout.nbytes,):
        raise ShapeError(
            f"routing has shape {tuple(routing.shape)}; {num_tokens} tokens with top_k={top_k} and "
            f"num_experts={num_experts} make ({layout.nbytes},)"
        )
    parts = {}
    for name, field in layout.fields.items():
        size = prod(field.shape) * _itemsize(field.dtype)
        part = routing[field.offset : field.offset + size]
        parts[name] = part.view(getattr(framework, field.dtype)).reshape(field.shape)
    return parts.pop("tokens_per_expert"), RoutingPlan(**parts)


def _itemsize(dtype: str) -> int:
    return 8 if dtype == "float64" else 4
