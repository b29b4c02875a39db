"""The router's logits of few tokens, such as are decoded (kernels/gate_logits_few.cu)."""

from ..arrays cimport BFLOAT16, FLOAT16, FLOAT32, Array, Space
from .grouped_gemm cimport address, divided_up
from .launch cimport Parameter, kernel

cdef enum:
    # the same as in kernels/gate_logits_few.cu
    WARPS = 8   # experts of a block
    TOKENS = 8  # of a block
    MOST_TOKENS = 256  # of more, the tensor cores' products are worth their start

cdef dict _DEFINES = {
    (x, gate): (f"X_TYPE={x}", f"GATE_TYPE={gate}")
    for x in (<int>FLOAT32, <int>BFLOAT16, <int>FLOAT16)
    for gate in (x, <int>FLOAT32)
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
    cdef Parameter[6] params = [&x.data, &gate.data, &logits.data, &num_tokens, &num_experts, &depth]
    return kernel("gate_logits_few.cu", "gate_logits_few", _DEFINES[x.dtype, gate.dtype], space.device_id, 0).launch(
        <unsigned int>divided_up(num_experts, WARPS), <unsigned int>divided_up(num_tokens, TOKENS), 1, 32 * WARPS, 0,
        space.stream, params,
    )
