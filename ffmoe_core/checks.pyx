"""Checks of the public functions' input: every message names the argument, what it is and what would work."""

import numpy as np

from libc.stdlib cimport getenv
from libc.string cimport strcmp

from .arrays cimport BFLOAT16, FLOAT16, FLOAT32, FLOAT64, UINT8, Array, Space, view

from .arrays import DTYPE_NAMES
from .errors import ConfigError, DeviceError, DTypeError, LayoutError, NonFiniteError, ShapeError

cdef tuple FLOATING = (<int>FLOAT32, <int>FLOAT64, <int>BFLOAT16, <int>FLOAT16)


cdef int check_shape(
    Array array, str name, str symbols, int64_t d0, int64_t d1=-2, int64_t d2=-2
) except -1:
    """The rank and widths of ``array``; a wanted width of -1 is any, -2 is no such dimension."""
    cdef int rank = 1 + (d1 != -2) + (d2 != -2)
    if (
        array.ndim == rank
        and (d0 == -1 or array.dims[0] == d0)
        and (d1 < 0 or array.dims[1] == d1)
        and (d2 < 0 or array.dims[2] == d2)
    ):
        return 0
    wanted = ", ".join("any" if d == -1 else str(d) for d in (d0, d1, d2)[:rank])
    raise ShapeError(f"{name} has shape {array.shape}; expected {symbols} = ({wanted})")


cdef int check_widths(Array array, str name, str symbols) except -1:
    """No width but the first, which counts rows or tokens, is 0."""
    cdef int i
    for i in range(1, array.ndim):
        if array.dims[i] == 0:
            raise ShapeError(f"{name} has shape {array.shape}; expected {symbols} with widths of at least 1")
    return 0


cdef int check_apart(Array out, str name, Array other, str other_name) except -1:
    """An output that does not overlap an input: some of it is written before all of that is read."""
    cdef int64_t size = out.nbytes, other_size = other.nbytes
    if (
        out.device_type == other.device_type and out.device_id == other.device_id and size > 0 and other_size > 0
        and out.data < other.data + other_size and other.data < out.data + size
    ):
        raise LayoutError(f"{name} overlaps {other_name} in memory; pass another array, or none")
    return 0


cdef int check_device(Array array, str name, Array other, str other_name) except -1:
    if array.device_type != other.device_type or array.device_id != other.device_id:
        raise DeviceError(f"{name} is on {array.device} but {other_name} is on {other.device}; move one of them")
    return 0


cdef int check_dtype(Array array, str name, tuple allowed) except -1:
    if array.dtype in allowed:
        return 0
    wanted = " or ".join(DTYPE_NAMES[dtype] for dtype in dict.fromkeys(allowed))
    raise DTypeError(f"{name} has dtype {array.dtype_name}; expected {wanted}")


cdef int check_floating(Array array, str name) except -1:
    return check_dtype(array, name, FLOATING)


cdef int check_like(Array array, str name, Array other, str other_name) except -1:
    """Same dtype and device."""
    check_device(array, name, other, other_name)
    if array.dtype != other.dtype:
        raise DTypeError(
            f"{name} has dtype {array.dtype_name} but {other_name} has {other.dtype_name}; they must agree"
        )
    return 0


cdef int check_rows(int64_t num_tokens, int64_t top_k) except -1:
    if num_tokens * top_k >= 1 << 31:
        raise ShapeError(
            f"{num_tokens} tokens with top_k={top_k} make {num_tokens * top_k} rows; "
            f"at most {(1 << 31) - 1} a call: split the batch"
        )
    return 0


cdef int check_sums(object obj, Array out, str name, Array other, str other_name) except -1:
    """An array for sums of products of ``other``: in its dtype or theirs, and not read-only."""
    check_device(out, name, other, other_name)
    check_dtype(out, name, (other.dtype, router_dtype(other)))
    return check_writable(obj, out, name)


cdef int check_output(object obj, Array out, str name, Array other, str other_name) except -1:
    """An ``out=`` array: like ``other``, and not read-only."""
    check_like(out, name, other, other_name)
    return check_writable(obj, out, name)


cdef Array output_of(Space space, object out, str name, tuple shape, Array like, str like_name):
    """The array of an ``out=`` argument, or a new one, of the dtype of ``like``."""
    cdef Array array
    if out is None:
        return space.empty(shape, like.dtype)
    array = view(out, name)
    if array.shape != shape:
        raise ShapeError(f"{name} has shape {array.shape}; expected {shape}")
    check_output(out, array, name, like, like_name)
    return array


cdef int check_writable(object obj, Array array, str name) except -1:
    """``array`` is the view of ``obj``, through an array of its own for what only speaks DLPack."""
    for holder in (obj, array.owner):
        if not getattr(getattr(holder, "flags", None), "writeable", True):
            raise LayoutError(f"{name} is read-only; pass an array that can be written")
    return 0


cdef Array bias_of(object expert_bias, int64_t num_experts, Array x):
    """The selection's bias, or None."""
    if expert_bias is None:
        return None
    cdef Array bias = view(expert_bias, "expert_bias")
    check_shape(bias, "expert_bias", "[num_experts]", num_experts)
    check_device(bias, "expert_bias", x, "x")
    check_dtype(bias, "expert_bias", (<int>FLOAT32,))
    return bias


cdef Array mask_of(object valid_mask, int64_t num_tokens, Array x):
    """Which tokens count, or None."""
    if valid_mask is None:
        return None
    cdef Array mask = view(valid_mask, "valid_mask")
    check_shape(mask, "valid_mask", "[T]", num_tokens)
    check_device(mask, "valid_mask", x, "x")
    if mask.dtype != UINT8:
        raise DTypeError(f"valid_mask has dtype {mask.dtype_name}; expected bool or uint8")
    return mask


cdef int router_dtype(Array x) noexcept:
    """What the router computes in: float32, or float64 for a float64 layer."""
    return FLOAT64 if x.dtype == FLOAT64 else FLOAT32


cdef int check_finite(Space space, Array logits) except -1:
    """Checked mode (FFMOE_CHECK=1): the router's logits must be finite. Waits for the device."""
    cdef const char* checked = getenv("FFMOE_CHECK")  # os.environ costs as much as a kernel's launch
    if checked == NULL or checked[0] == 0 or strcmp(checked, "0") == 0:
        return 0
    if strcmp(checked, "1") != 0:
        raise ConfigError(f"FFMOE_CHECK={checked.decode(errors='replace')!r} must be '1' (checked mode) or '0'")
    finite = np.isfinite(space.to_host(logits)).all(axis=1)
    if finite.all():
        return 0
    tokens = np.flatnonzero(~finite)
    raise NonFiniteError(
        f"router_input (or gate_weight) gives NaN or infinite logits for {tokens.size} of {finite.size} "
        f"tokens, the first is token {tokens[0]}"
    )


def check_config(config, expected):
    if not isinstance(config, expected):
        raise ConfigError(f"config={config!r} must be a {expected.__name__}")


def check_type(value, name, expected, source):
    """``value`` is what ``source`` gives, and no other part of it."""
    if not isinstance(value, expected):
        raise ConfigError(f"{name} is a {type(value).__name__}; expected a {expected.__name__}, {source}")
