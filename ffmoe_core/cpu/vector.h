/* The loops over one row that routing and the combine spend their time in. */
#ifndef FFMOE_VECTOR_H
#define FFMOE_VECTOR_H

#include "exp.h"

#define FFMOE_DEFINE_VECTOR(REAL, SUFFIX)                                                                    \
    /* y += w * x */                                                                                         \
    FFMOE_CLONES static void ffmoe_axpy_##SUFFIX(int64_t n, REAL w, const REAL* x, REAL* y) {                \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] += w * x[i];                                \
    }                                                                                                        \
    /* out = exp(x - top), where top is the largest of x; returns the sum */                                 \
    FFMOE_CLONES static REAL ffmoe_exp_shifted_##SUFFIX(int64_t n, const REAL* x, REAL top, REAL* out) {     \
        REAL sum = 0;                                                                                        \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; i++) {                             \
            out[i] = ffmoe_exp_nonpositive_##SUFFIX(x[i] - top);                                             \
            sum += out[i];                                                                                   \
        }                                                                                                    \
        return sum;                                                                                          \
    }                                                                                                        \
    FFMOE_CLONES static void ffmoe_sigmoid_##SUFFIX(int64_t n, const REAL* x, REAL* out) {                   \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                                \
            const REAL e = ffmoe_exp_nonpositive_##SUFFIX(x[i] < 0 ? x[i] : -x[i]);                          \
            out[i] = (x[i] < 0 ? e : 1) / (1 + e);                                                           \
        }                                                                                                    \
    }

FFMOE_DEFINE_VECTOR(float, f32)
FFMOE_DEFINE_VECTOR(double, f64)

#endif
