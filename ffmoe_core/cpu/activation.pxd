"""The gated activations over one row (activation.h)."""

from libc.stdint cimport int64_t

from .blas cimport real

cdef extern from "activation.h" nogil:
    enum:
        FFMOE_SWIGLU
        FFMOE_GEGLU
        FFMOE_RELU_SQUARED
    void ffmoe_glu_f32(int kind, int64_t n, const float* gate, const float* up, float* a)
    void ffmoe_glu_f64(int kind, int64_t n, const double* gate, const double* up, double* a)
    float ffmoe_glu_backward_f32(
        int kind, int64_t n, const float* gate, const float* up, const float* da, float p,
        float* dgate, float* dup, float* pa,
    )
    double ffmoe_glu_backward_f64(
        int kind, int64_t n, const double* gate, const double* up, const double* da, double p,
        double* dgate, double* dup, double* pa,
    )


cdef inline int activation_kind(str name) except -1:
    return {"swiglu": FFMOE_SWIGLU, "geglu": FFMOE_GEGLU, "relu_squared": FFMOE_RELU_SQUARED}[name]


cdef inline void glu(int kind, int64_t n, const real* gate, const real* up, real* a) noexcept nogil:
    """a = act(gate) * up."""
    if real is float:
        ffmoe_glu_f32(kind, n, gate, up, a)
    else:
        ffmoe_glu_f64(kind, n, gate, up, a)


cdef inline real glu_backward(
    int kind, int64_t n, const real* gate, const real* up, const real* da, real p,
    real* dgate, real* dup, real* pa,
) noexcept nogil:
    """dgate, dup and p*a from da' (before the weight p); returns <da', a>."""
    if real is float:
        return ffmoe_glu_backward_f32(kind, n, gate, up, da, p, dgate, dup, pa)
    else:
        return ffmoe_glu_backward_f64(kind, n, gate, up, da, p, dgate, dup, pa)
