"""The router's logits on Hopper, from 16-bit operands (kernels/gate_logits_sm90.cu): at the rate of reading x."""

from ..arrays cimport BFLOAT16, FLOAT16, FLOAT32, Array, Space
from . cimport grouped_gemm_sm90 as sm90
from .grouped_gemm cimport address, divided_up
from .launch cimport Parameter, kernel
from .tensor_map cimport TensorMap, map_matrices

cdef enum:
    TILE = 128
    THREADS = 384
    STAGES = 6
    SHARED_BYTES = STAGES * (2 * TILE * 64 * 2 + 2 * 8)  # the stages, then two barriers for each
    FEWEST_TOKENS = 8192  # fewer give too few blocks work

cdef dict _defines = {x: (f"X_TYPE={x}",) for x in (<int>BFLOAT16, <int>FLOAT16)}


def variants():
    """Every (file, entry, defines) that this module can launch."""
    return [("gate_logits_sm90.cu", "gate_logits", defines) for defines in _defines.values()]


cdef bint serves(Space space, Array x, Array gate, Array logits) except -1:
    """Whether this can be done here, and is faster."""
    return (
        x.dims[0] >= FEWEST_TOKENS
        and x.dtype == gate.dtype
        and logits.dtype == FLOAT32
        and sm90.serves(
            x.dtype, address(x) | address(gate) | address(logits), x.dims[1] | gate.dims[0], 1, space.device_id
        )
    )


cdef int gate_logits(Space space, Array x, Array gate, Array logits) except -1:
    """logits [T, E] float32 = x [T, H] gate [E, H]^T, where ``serves`` says so."""
    cdef int num_tokens = <int>x.dims[0], depth = <int>x.dims[1], num_experts = <int>gate.dims[0]
    cdef int column_tiles = <int>divided_up(num_experts, TILE)
    cdef TensorMap x_map, gate_map
    map_matrices(&x_map, x, 1, num_tokens, depth, TILE)
    map_matrices(&gate_map, gate, 1, num_experts, depth, TILE)
    cdef Parameter[7] params = [
        x_map.at, gate_map.at, &logits.data, &num_tokens, &num_experts, &depth, &column_tiles,
    ]
    return kernel("gate_logits_sm90.cu", "gate_logits", _defines[x.dtype], space.device_id, SHARED_BYTES).launch(
        <unsigned int>(divided_up(num_tokens, TILE) * column_tiles), 1, 1, THREADS, SHARED_BYTES, space.stream,
        params,
    )
