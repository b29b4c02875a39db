"""Loops over one row, in C so that the compiler can make a version for each vector width (vector.h)."""

from libc.stdint cimport int64_t

from .blas cimport real

cdef extern from "vector.h" nogil:
    void ffmoe_axpy_f32(int64_t n, float w, const float* x, float* y)
    void ffmoe_axpy_f64(int64_t n, double w, const double* x, double* y)
    float ffmoe_exp_shifted_f32(int64_t n, const float* x, float top, float* out)
    double ffmoe_exp_shifted_f64(int64_t n, const double* x, double top, double* out)
    void ffmoe_sigmoid_f32(int64_t n, const float* x, float* out)
    void ffmoe_sigmoid_f64(int64_t n, const double* x, double* out)


cdef inline void axpy(int64_t n, real w, const real* x, real* y) noexcept nogil:
    """y += w * x."""
    if real is float:
        ffmoe_axpy_f32(n, w, x, y)
    else:
        ffmoe_axpy_f64(n, w, x, y)


cdef inline real exp_shifted(int64_t n, const real* x, real top, real* out) noexcept nogil:
    """out = exp(x - top), where top is the largest of x; returns the sum."""
    if real is float:
        return ffmoe_exp_shifted_f32(n, x, top, out)
    else:
        return ffmoe_exp_shifted_f64(n, x, top, out)


cdef inline void sigmoid(int64_t n, const real* x, real* out) noexcept nogil:
    if real is float:
        ffmoe_sigmoid_f32(n, x, out)
    else:
        ffmoe_sigmoid_f64(n, x, out)
