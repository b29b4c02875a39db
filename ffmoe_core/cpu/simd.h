/* How a loop of the CPU backend gets vectors wider than the baseline of a portable build. */
#ifndef FFMOE_SIMD_H
#define FFMOE_SIMD_H

#include <stdint.h>
#include <string.h>

/* glibc's loader picks the clone for the processor at hand (an ifunc). Elsewhere there is one version: other
   architectures (arm64) have their vectors in the baseline, and other C libraries have no ifunc. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FFMOE_CLONES __attribute__((unused, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__GNUC__)
#define FFMOE_CLONES __attribute__((unused))
#else
#define FFMOE_CLONES
#endif

/* What a clone calls has to be inlined to get the clone's instructions. */
#if defined(__GNUC__)
#define FFMOE_INLINE static inline __attribute__((always_inline, unused))
#else
#define FFMOE_INLINE static inline
#endif

FFMOE_INLINE float ffmoe_float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

FFMOE_INLINE uint32_t ffmoe_bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

#endif
