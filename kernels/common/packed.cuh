// Elements on their way from memory, in the words they come in.
//
// Numbers that are unpacked where they are loaded are waited for at once, and take twice the registers until then.
#pragma once

#include "types.cuh"

// N of float or of 16 bits, aligned to 16 bytes.
template <class X, int N> struct alignas(16) Packed {
    uint32 words[N * int(sizeof(X)) / 4];

    __device__ __forceinline__ void add_to(float (&sums)[N], float factor = 1) const {
#pragma unroll
        for (int w = 0; w < N * int(sizeof(X)) / 4; ++w) {
            if constexpr (sizeof(X) == 4) {
                sums[w] += factor * __uint_as_float(words[w]);
            } else {
                float low, high;
                unpack2<X>(words[w], low, high);
                sums[2 * w] += factor * low;
                sums[2 * w + 1] += factor * high;
            }
        }
    }
};

template <class X, int N> __device__ __forceinline__ Packed<X, N> load_packed(const X* from) {
    return *reinterpret_cast<const Packed<X, N>*>(from);
}
