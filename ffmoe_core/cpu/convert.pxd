"""Rows of a 16-bit type as float32 and back (convert.h); a row of the computing type is copied."""

from libc.stdint cimport int64_t, uint16_t
from libc.string cimport memcpy

from ..arrays cimport BFLOAT16, FLOAT16
from .blas cimport real

cdef extern from "convert.h" nogil:
    void ffmoe_widen_bf16(int64_t n, const uint16_t* source, float* to)
    void ffmoe_narrow_bf16(int64_t n, const float* source, uint16_t* to)
    void ffmoe_widen_fp16(int64_t n, const uint16_t* source, float* to)
    void ffmoe_narrow_fp16(int64_t n, const float* source, uint16_t* to)


cdef inline void load(int dtype, int64_t n, const char* source, real* to) noexcept nogil:
    """n elements of ``dtype`` into the computing type, which is ``dtype`` itself or float32 for 16 bits."""
    if real is float:
        if dtype == BFLOAT16:
            ffmoe_widen_bf16(n, <const uint16_t*>source, to)
            return
        if dtype == FLOAT16:
            ffmoe_widen_fp16(n, <const uint16_t*>source, to)
            return
    memcpy(to, source, n * sizeof(real))


cdef inline void store(int dtype, int64_t n, const real* source, char* to) noexcept nogil:
    """The way back, rounded to nearest even."""
    if real is float:
        if dtype == BFLOAT16:
            ffmoe_narrow_bf16(n, source, <uint16_t*>to)
            return
        if dtype == FLOAT16:
            ffmoe_narrow_fp16(n, source, <uint16_t*>to)
            return
    memcpy(to, source, n * sizeof(real))
