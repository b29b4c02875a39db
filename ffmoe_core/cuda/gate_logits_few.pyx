"""The router's logits of few tokens, such as are decoded (kernels/gate_logits_few.cu)."""

from ..arrays cimport BFLOAT16, FLOAT16, FLOAT32, Array, Space
from .grouped_gemm cimport address, divided_up
from .launch cimport Parameter, kernel

cdef enum:
    WARPS = 8   # experts of a block; the same as in kernels/gate_logits_few.cu
    MOST_TOKENS = 128  # of more, the tensor cores' products are worth their start

# by types, and by how many tokens a warp takes
cdef dict _DEFINES = {
    (x, gate, tokens): (f"X_TYPE={x}", f"GATE_TYPE={gate}", f"TOKENS={tokens}")
    for x in (<int>FLOAT32, <int>BFLOAT16, <int>FLOAT16)
    for gate in (x, <int>FLOAT32)
    for tokens in (1, 4)
}


def variants():
    """Every (file, entry, defines) that this module can launch."""
    return [("gate_logits_few.cu", "gate_logits_few", defines) for defines in _DEFINES.values()]


cdef bint serves(Array x, Array gate, Array logits) except -1:
    """Whether this can be done here, and is faster."""
    return (
        0 < x.dims[0] <= MOST_TOKENS
        and logits.dtype == FLOAT32
        and x.dims[1] % 8 == 0
        and (address(x) | address(gate)) % 16 == 0
    )


cdef int gate_logits(Space space, Array x, Array gate, Array logits) except -1:
    """logits [T, E] float32 = x [T, H] gate [E, H]^T, where ``serves`` says so."""
    cdef int num_tokens = <int>x.dims[0], depth = <int>x.dims[1], num_experts = <int>gate.dims[0]
    cdef int tokens = 1 if num_tokens == 1 else 4
    cdef tuple defines = _DEFINES[x.dtype, gate.dtype, tokens]
    cdef Parameter[6] params = [&x.data, &gate.data, &logits.data, &num_tokens, &num_experts, &depth]
    return kernel("gate_logits_few.cu", "gate_logits_few", defines, space.device_id, 0).launch(
        <unsigned int>divided_up(num_experts, WARPS), <unsigned int>divided_up(num_tokens, tokens), 1, 32 * WARPS, 0,
        space.stream, params,
    )
