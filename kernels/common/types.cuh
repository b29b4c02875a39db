// Element types, how they are converted, and vectors of them.
//
// No CUDA header is included: NVRTC finds none on a machine without a toolkit, and compiles faster.
#pragma once

#include "ptx.cuh"

using int64 = long long;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

// A 16-bit number is its bits; arithmetic is done in float.
struct bfloat16 {
    uint16 bits;
};
struct float16 {
    uint16 bits;
};

// The codes of DType in ffmoe_core/arrays.pxd; a define like -DX_TYPE=2 holds one: using X = type_of<X_TYPE>.
template <int code> struct TypeOf;
template <> struct TypeOf<0> {
    using type = float;
};
template <> struct TypeOf<1> {
    using type = double;
};
template <> struct TypeOf<2> {
    using type = bfloat16;
};
template <> struct TypeOf<3> {
    using type = float16;
};
template <int code> using type_of = typename TypeOf<code>::type;

// What sums of products of X are kept in, and what the router of a layer of X computes in.
template <class X> struct AccumulatorOf {
    using type = float;
};
template <> struct AccumulatorOf<double> {
    using type = double;
};
template <class X> using accumulator_of = typename AccumulatorOf<X>::type;

// --- to float or double ---

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(uint32(x.bits) << 16); }
__device__ __forceinline__ float widen(float16 x) { return float_of_float16(x.bits); }

// --- and back, to the nearest, ties to even ---

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, double& out) { out = x; }
__device__ __forceinline__ void narrow(double x, float& out) { out = float(x); }
__device__ __forceinline__ void narrow(float x, bfloat16& out) { out.bits = bfloat16_bits(x); }
__device__ __forceinline__ void narrow(float x, float16& out) { out.bits = float16_bits(x); }

template <class X, class A> __device__ __forceinline__ X narrow_to(A x) {
    X out;
    narrow(x, out);
    return out;
}

// --- vectors ---

// N elements that are read and written as one; 16 bytes is the widest access of a thread.
template <class X, int N> struct alignas(sizeof(X) * N) Vector {
    X at[N];
};
template <class X> constexpr int VECTOR_WIDTH = 16 / int(sizeof(X));
template <class X> using Vector16 = Vector<X, VECTOR_WIDTH<X>>;

// `from` and `to` must be aligned to the vector's size.
template <class X, int N> __device__ __forceinline__ Vector<X, N> load_vector(const X* from) {
    return *reinterpret_cast<const Vector<X, N>*>(from);
}
template <class X, int N> __device__ __forceinline__ void store_vector(X* to, const Vector<X, N>& value) {
    *reinterpret_cast<Vector<X, N>*>(to) = value;
}

// 16 bytes: see store_streaming.
template <class X, int N> __device__ __forceinline__ void stream_vector16(X* to, const Vector<X, N>& value) {
    const auto& words = reinterpret_cast<const Vector<uint32, 4>&>(value);
    store_streaming(to, words.at[0], words.at[1], words.at[2], words.at[3]);
}

// Two 16-bit elements in one register, `low` at the lower address: what mma.sync takes.
template <class X> __device__ __forceinline__ uint32 pack2(float low, float high);
template <> __device__ __forceinline__ uint32 pack2<bfloat16>(float low, float high) {
    return bfloat16_pair(low, high);
}
template <> __device__ __forceinline__ uint32 pack2<float16>(float low, float high) {
    return float16_pair(low, high);
}

// And back.
template <class X> __device__ __forceinline__ void unpack2(uint32 pair, float& low, float& high);
template <> __device__ __forceinline__ void unpack2<bfloat16>(uint32 pair, float& low, float& high) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
}
template <> __device__ __forceinline__ void unpack2<float16>(uint32 pair, float& low, float& high) {
    low = widen(float16{uint16(pair)});
    high = widen(float16{uint16(pair >> 16)});
}
