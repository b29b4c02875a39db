"""The router's logits on Hopper, from 16-bit operands (kernels/gate_logits_sm90.cu): at the rate of reading x."""

from libc.stdint cimport int64_t

from ..arrays cimport BFLOAT16, FLOAT16, FLOAT32, Array, Space
from . cimport grouped_gemm_sm90 as sm90
from .grouped_gemm cimport address, divided_up
from .launch cimport Parameter, kernel, multiprocessor_count
from .tensor_map cimport TensorMap, map_matrices

cdef enum:
    EXPERTS = 128         # of a tile
    TOKENS = 64           # for each warpgroup that multiplies
    MOST_CONSUMERS = 3
    WARPGROUP = 128
    DEPTH_BYTES = 128     # of a row of a stage
    TILE_COST = 24        # what a tile costs beside reading its tokens, in tokens
    # fewer give too few blocks work
    FEWEST_TOKENS = 8192
    FEWEST_LOGITS = 1 << 18

# the stages that fit into shared memory, by the warpgroups that multiply
cdef dict _STAGES = {1: 8, 2: 6, 3: 5}
cdef dict _DEFINES = {
    x: {
        consumers: (f"X_TYPE={x}", f"CONSUMERS={consumers}", f"STAGES={stages}")
        for consumers, stages in _STAGES.items()
    }
    for x in (<int>BFLOAT16, <int>FLOAT16)
}


def variants():
    """Every (file, entry, defines) that this module can launch."""
    return [
        ("gate_logits_sm90.cu", "gate_logits", defines)
        for of_dtype in _DEFINES.values() for defines in of_dtype.values()
    ]


cdef bint serves(Space space, Array x, Array gate, Array logits) except -1:
    """Whether this can be done here, and is faster."""
    return (
        (x.dims[0] >= FEWEST_TOKENS or x.dims[0] * gate.dims[0] >= FEWEST_LOGITS)
        and x.dtype == gate.dtype
        and logits.dtype == FLOAT32
        and gate.dims[0] % 2 == 0  # of a row's logits two are stored at a time
        and sm90.serves(x.dtype, address(x) | address(gate) | address(logits), x.dims[1], 1, space.device_id)
    )


cdef int consumers_for(int64_t num_tokens, int64_t column_tiles, int64_t blocks):
    """The warpgroups that share a tile, so that the block with most tiles is done soonest."""
    cdef int64_t cost, least = -1
    cdef int consumers, best = 1
    for consumers in range(1, MOST_CONSUMERS + 1):
        cost = divided_up(num_tokens, TOKENS * consumers) * column_tiles
        cost = divided_up(cost, blocks) * (TOKENS * consumers + TILE_COST)
        if least < 0 or cost < least:
            least = cost
            best = consumers
    return best


cdef int gate_logits(Space space, Array x, Array gate, Array logits) except -1:
    """logits [T, E] float32 = x [T, H] gate [E, H]^T, where ``serves`` says so."""
    cdef int num_tokens = <int>x.dims[0], depth = <int>x.dims[1], num_experts = <int>gate.dims[0]
    cdef int column_tiles = <int>divided_up(num_experts, EXPERTS)
    cdef int64_t blocks = multiprocessor_count(space.device_id)
    cdef int consumers = consumers_for(num_tokens, column_tiles, blocks)
    cdef int tokens = TOKENS * consumers, threads = (consumers + 1) * WARPGROUP
    cdef unsigned int shared = <int>_STAGES[consumers] * ((tokens + EXPERTS) * DEPTH_BYTES + 2 * 8)  # two barriers each
    blocks = min(blocks, divided_up(num_tokens, tokens) * column_tiles)
    cdef TensorMap x_map, gate_map
    map_matrices(&x_map, x, 1, num_tokens, depth, tokens)
    map_matrices(&gate_map, gate, 1, num_experts, depth, EXPERTS)
    cdef Parameter[7] params = [
        x_map.at, gate_map.at, &logits.data, &num_tokens, &num_experts, &depth, &column_tiles,
    ]
    return kernel("gate_logits_sm90.cu", "gate_logits", _DEFINES[x.dtype][consumers], space.device_id, shared).launch(
        <unsigned int>blocks, 1, 1, threads, shared, space.stream, params
    )
