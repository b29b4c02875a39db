// Floating-point numbers as unsigned integers in the same order, to rank them with integer instructions.
//
// NaN ranks as minus infinity and the two zeros are equal. 0 is no number's key: it stands below all of them.
#pragma once

#include "common/types.cuh"

template <class W> struct KeyOf;
template <> struct KeyOf<float> {
    using type = uint32;
};
template <> struct KeyOf<double> {
    using type = uint64;
};
template <class W> using key_of = typename KeyOf<W>::type;

__device__ __forceinline__ uint32 order_key(float x) {
    // minus infinity instead of NaN, 0 instead of -0
    const uint32 bits = __float_as_uint(fmaxf(x, __int_as_float(0xff800000)) + 0.0f);
    return bits ^ (uint32(int(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ uint64 order_key(double x) {
    if (x != x) return 0x000fffffffffffffull;
    const uint64 bits = x == 0 ? 0ull : uint64(__double_as_longlong(x));
    return bits >> 63 ? ~bits : bits | 0x8000000000000000ull;
}

__device__ __forceinline__ float number_of(uint32 key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ double number_of(uint64 key) {
    return __longlong_as_double((long long)(key >> 63 ? key & 0x7fffffffffffffffull : ~key));
}
