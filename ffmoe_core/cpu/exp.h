/* exp of what is not positive: all that sigmoid and softmax ask for. */
#ifndef FFMOE_EXP_H
#define FFMOE_EXP_H

#include <math.h>

#include "simd.h"

/* Within 2 units in the last place where the result is a normal number; 0 from -105 down; NaN stays NaN.
   No branch and no call, so that a loop around it becomes vectors. */
FFMOE_INLINE float ffmoe_exp_nonpositive_f32(float x) {
    const float round_magic = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
    x = x < -105.0f ? -105.0f : x;
    const float shifted = x * 1.44269504f + round_magic;
    const float n = shifted - round_magic;
    /* ln 2 in two parts, of which the first times n is exact */
    const float r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
    /* minimax of (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2; its relative error is 3.3e-9 */
    const float p =
        (((1.38131447e-3f * r + 8.36941883e-3f) * r + 4.16684568e-2f) * r + 0.166665148f) * r + 0.49999993f;
    const float y = (p * r) * r + r + 1.0f;
    /* 2^n in two factors: n reaches -152, below the smallest normal number */
    const int32_t power = (int32_t)(ffmoe_bits_of(shifted) - ffmoe_bits_of(round_magic));
    const int32_t half = power >> 1;
    const uint32_t low = (uint32_t)(half + 127) << 23, high = (uint32_t)(power - half + 127) << 23;
    return y * ffmoe_float_of(low) * ffmoe_float_of(high);
}

FFMOE_INLINE double ffmoe_exp_nonpositive_f64(double x) { return exp(x); }

#endif
