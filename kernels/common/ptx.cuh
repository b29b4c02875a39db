// Single instructions that C++ has no words for. What moves memory asynchronously or multiplies matrices has headers
// of its own.
#pragma once

// --- conversions to 16 bits, to the nearest, ties to even; and back ---

__device__ __forceinline__ unsigned short bfloat16_bits(float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ __forceinline__ unsigned short float16_bits(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ __forceinline__ float float_of_float16(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
// Two at a time, `low` in the lower half.
__device__ __forceinline__ unsigned int bfloat16_pair(float low, float high) {
    unsigned int pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ unsigned int float16_pair(float low, float high) {
    unsigned int pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// --- fast and approximate ---

__device__ __forceinline__ float approximate_exp2(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
__device__ __forceinline__ float approximate_reciprocal(float x) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

// --- addresses ---

// `count` times `pitch` bytes on: one instruction, where C++ takes two.
template <class X> __device__ __forceinline__ const X* advanced(const X* from, int count, int pitch) {
    const X* at;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(at) : "r"(count), "r"(pitch), "l"(from));
    return at;
}

// 16 bytes of 128 that are read piece by piece: the second-level cache fetches all of them.
__device__ __forceinline__ void load_piece(
    const void* from, unsigned int& a, unsigned int& b, unsigned int& c, unsigned int& d
) {
    asm volatile("ld.global.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "l"(from));
}

// 16 bytes that nothing reads soon: they should not drive others out of the second-level cache.
__device__ __forceinline__ void store_streaming(
    void* to, unsigned int a, unsigned int b, unsigned int c, unsigned int d
) {
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
