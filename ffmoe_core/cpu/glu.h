/* The gated activations and their gradients over one row, in REAL. activation.h includes this once a type.

   sigmoid(v) is written with exp(-|v|), which never overflows. The clamps keep an infinite gate from meeting
   a zero (inf * 0): silu(-inf) is 0, its slope at +inf is 1. Comparisons let NaN pass through. */

FFMOE_INLINE REAL NAME(clamp)(REAL x, REAL bound) { return x < -bound ? -bound : x > bound ? bound : x; }

/* act(g), and its slope where `slope` is asked for (a constant, so that the other case costs nothing) */
FFMOE_INLINE REAL NAME(act)(int kind, REAL g, REAL* slope) {
    if (kind == FFMOE_RELU_SQUARED) {
        const REAL r = g < 0 ? 0 : g;
        if (slope) *slope = 2 * r;
        return r * r;
    }
    /* gelu(g) by tanh is g * sigmoid(v) as silu is, with v = 2 sqrt(2/pi) (g + 0.044715 g^3) */
    const REAL c1 = (REAL)1.5957691216057308, c3 = (REAL)(1.5957691216057308 * 0.044715);
    const REAL v = kind == FFMOE_SWIGLU ? g : g * (c1 + c3 * (g * g));
    const REAL e = NAME(exp_nonpositive)(v < 0 ? v : -v);
    const REAL inverse = 1 / (1 + e);
    const REAL sigmoid = (v < 0 ? e : 1) * inverse;
    if (slope) {
        const REAL rest = (v < 0 ? 1 : e) * inverse; /* 1 - sigmoid, without cancellation */
        /* past the clamp sigmoid * rest is 0 for both; g^2 must not overflow before it meets that 0 */
        const REAL h = NAME(clamp)(g, (REAL)1e6);
        const REAL dv = kind == FFMOE_SWIGLU ? 1 : c1 + 3 * c3 * (h * h);
        *slope = sigmoid + h * dv * (sigmoid * rest);
    }
    return (g < -REAL_MAX ? -REAL_MAX : g) * sigmoid;
}

FFMOE_INLINE void NAME(forward)(int kind, int64_t n, const REAL* gate, const REAL* up, REAL* a) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) a[i] = NAME(act)(kind, gate[i], 0) * up[i];
}

FFMOE_INLINE REAL NAME(backward)(int kind, int64_t n, const REAL* gate, const REAL* up, const REAL* da,
                                 REAL p, REAL* dgate, REAL* dup, REAL* pa) {
    REAL dp = 0;
#pragma omp simd reduction(+ : dp)
    for (int64_t i = 0; i < n; i++) {
        REAL slope;
        const REAL value = NAME(act)(kind, gate[i], &slope);
        const REAL u = up[i], d = da[i], a = value * u;
        dp += d * a;
        pa[i] = p * a;
        dgate[i] = p * d * u * slope;
        dup[i] = p * d * value;
    }
    return dp;
}

/* a = act(gate) * up. `a` may be `gate` or `up` itself. */
FFMOE_CLONES static void NAME(glu)(int kind, int64_t n, const REAL* gate, const REAL* up, REAL* a) {
    if (kind == FFMOE_SWIGLU) NAME(forward)(FFMOE_SWIGLU, n, gate, up, a);
    else if (kind == FFMOE_GEGLU) NAME(forward)(FFMOE_GEGLU, n, gate, up, a);
    else NAME(forward)(FFMOE_RELU_SQUARED, n, gate, up, a);
}

/* From da' (before the weight p): dgate, dup, p * a; returns <da', a>. Outputs may be inputs. */
FFMOE_CLONES static REAL NAME(glu_backward)(int kind, int64_t n, const REAL* gate, const REAL* up,
                                            const REAL* da, REAL p, REAL* dgate, REAL* dup, REAL* pa) {
    if (kind == FFMOE_SWIGLU) return NAME(backward)(FFMOE_SWIGLU, n, gate, up, da, p, dgate, dup, pa);
    if (kind == FFMOE_GEGLU) return NAME(backward)(FFMOE_GEGLU, n, gate, up, da, p, dgate, dup, pa);
    return NAME(backward)(FFMOE_RELU_SQUARED, n, gate, up, da, p, dgate, dup, pa);
}
