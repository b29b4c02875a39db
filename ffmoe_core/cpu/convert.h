/* bfloat16 and float16 to float32 and back: round to nearest even, NaN stays NaN, subnormals kept. */
#ifndef FFMOE_CONVERT_H
#define FFMOE_CONVERT_H

#include "simd.h"

FFMOE_INLINE float ffmoe_from_bf16(uint16_t h) { return ffmoe_float_of((uint32_t)h << 16); }

FFMOE_INLINE uint16_t ffmoe_to_bf16(float x) {
    const uint32_t bits = ffmoe_bits_of(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u; /* a NaN must not round up to infinity */
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

FFMOE_INLINE float ffmoe_from_fp16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t magnitude = h & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + (112u << 23); /* exponent bias 15 to 127 */
    const uint32_t special = (magnitude << 13) + (224u << 23); /* infinity and NaN: exponent 31 to 255 */
    const uint32_t subnormal = ffmoe_bits_of((float)(int32_t)magnitude * 0x1p-24f);
    const uint32_t bits = magnitude < 0x400u ? subnormal : magnitude < 0x7c00u ? normal : special;
    return ffmoe_float_of(sign | bits);
}

FFMOE_INLINE uint16_t ffmoe_to_fp16(float x) {
    const uint32_t bits = ffmoe_bits_of(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    /* 0.5f has float16's smallest subnormal as its last place, so this addition does the rounding */
    const uint32_t subnormal = ffmoe_bits_of(ffmoe_float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    return (uint16_t)(sign | (magnitude < 0x477ff000u ? finite : special));
}

FFMOE_CLONES static void ffmoe_widen_bf16(int64_t n, const uint16_t* from, float* to) {
    for (int64_t i = 0; i < n; i++) to[i] = ffmoe_from_bf16(from[i]);
}

FFMOE_CLONES static void ffmoe_narrow_bf16(int64_t n, const float* from, uint16_t* to) {
    for (int64_t i = 0; i < n; i++) to[i] = ffmoe_to_bf16(from[i]);
}

FFMOE_CLONES static void ffmoe_widen_fp16(int64_t n, const uint16_t* from, float* to) {
    for (int64_t i = 0; i < n; i++) to[i] = ffmoe_from_fp16(from[i]);
}

FFMOE_CLONES static void ffmoe_narrow_fp16(int64_t n, const float* from, uint16_t* to) {
    for (int64_t i = 0; i < n; i++) to[i] = ffmoe_to_fp16(from[i]);
}

#endif
