// The GLU activations and their derivatives, in the accumulator's type.
#pragma once

#include "ptx.cuh"

// SHORT: the result will be rounded to 16 bits, so the fastest exponential and reciprocal will do.
template <bool SHORT> __device__ __forceinline__ float sigmoid(float x) {
    if (!SHORT) return __fdividef(1.0f, 1.0f + expf(-x));
    constexpr float LOG2_E = 1.4426950408889634f;
    return approximate_reciprocal(1.0f + approximate_exp2(-LOG2_E * x));
}
template <bool SHORT> __device__ __noinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// value = act(gate), slope = act'(gate)
template <class A> struct Activated {
    A value;
    A slope;
};

enum { SWIGLU = 0, GEGLU = 1, RELU_SQUARED = 2 };

template <bool SHORT, class A> __device__ __forceinline__ Activated<A> activate(int kind, A gate) {
    if (kind == SWIGLU) {
        const A s = sigmoid<SHORT>(gate);
        const A value = gate * s;
        return {value, s + value * (A(1) - s)};
    } else if (kind == GEGLU) {
        // 0.5 g (1 + tanh(v)) with v = sqrt(2/pi) (g + 0.044715 g^3), as g sigmoid(2 v): nothing cancels
        const A root = A(1.5957691216057308), cubic = A(0.044715);
        const A s = sigmoid<SHORT>(root * (gate + cubic * gate * gate * gate));
        const A bend = s * (A(1) - s);  // 0 where it has saturated, and its factor may have overflowed
        const A slope = bend == A(0) ? s : s + gate * bend * root * (A(1) + A(3) * cubic * gate * gate);
        return {gate * s, slope};
    } else {
        const A r = gate > A(0) ? gate : A(0);
        return {r * r, A(2) * r};
    }
}
