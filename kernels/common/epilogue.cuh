// What becomes of V finished neighbours in a row of a product.
#pragma once

#include "activation.cuh"
#include "types.cuh"

// V neighbours in pieces of up to 16 bytes, to which their address must be aligned.
template <class X, int V> constexpr int PIECE = V < VECTOR_WIDTH<X> ? V : VECTOR_WIDTH<X>;

template <class A, class X, int V>
__device__ __forceinline__ void store_values(const A (&values)[V], X* to) {
    constexpr int N = PIECE<X, V>;
#pragma unroll
    for (int i = 0; i < V; i += N) {
        Vector<X, N> piece;
#pragma unroll
        for (int j = 0; j < N; ++j) narrow(values[i + j], piece.at[j]);
        store_vector<X, N>(to + i, piece);
    }
}

template <class A, class X, int V>
__device__ __forceinline__ void load_values(A (&values)[V], const X* from) {
    constexpr int N = PIECE<X, V>;
#pragma unroll
    for (int i = 0; i < V; i += N) {
        const Vector<X, N> piece = load_vector<X, N>(from + i);
#pragma unroll
        for (int j = 0; j < N; ++j) values[i + j] = A(widen(piece.at[j]));
    }
}

// How the values below are moved: all of them at once,
struct Whole {
    template <class A, class X, int V>
    __device__ __forceinline__ void load(A (&values)[V], const X* from) const {
        load_values(values, from);
    }
    template <class A, class X, int V>
    __device__ __forceinline__ void store(const A (&values)[V], X* to) const {
        store_values(values, to);
    }
};
// all of them, 16 bytes that nothing will read soon,
struct Streamed {
    template <class A, class X, int V>
    __device__ __forceinline__ void store(const A (&values)[V], X* to) const {
        Vector<X, V> piece;
#pragma unroll
        for (int i = 0; i < V; ++i) narrow(values[i], piece.at[i]);
        stream_vector16(to, piece);
    }
};
// or the first `count` of them one by one, unless vectors are allowed. The others are left as they are.
struct First {
    int count;
    bool vectors;
    template <class A, class X, int V>
    __device__ __forceinline__ void load(A (&values)[V], const X* from) const {
        if (vectors) return load_values(values, from);
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (i < count) values[i] = A(widen(from[i]));
    }
    template <class A, class X, int V>
    __device__ __forceinline__ void store(const A (&values)[V], X* to) const {
        if (vectors) return store_values(values, to);
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (i < count) narrow(values[i], to[i]);
    }
};

// z = [gate, up] where it is wanted, a = act(gate) * up. z and a are at the values' place.
template <class A, class X, int V, class Move>
__device__ __forceinline__ void store_glu(
    Move move, int activation, const A (&gate)[V], const A (&up)[V], X* z, X* a, int64 intermediate
) {
    if (z != nullptr) {
        move.store(gate, z);
        move.store(up, z + intermediate);
    }
    A out[V];
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = activate<sizeof(X) == 2>(activation, gate[i]).value * up[i];
    move.store(out, a);
}

// From da', the gradient of a before its row's weight p, and z: dz and p a, and its part of dp = <da', a>.
// dz and pa are at the values' place.
template <class A, class X, int V, class Move>
__device__ __forceinline__ A store_glu_gradient(
    Move move, int activation, const A (&da)[V], A p, const A (&gate)[V], const A (&up)[V], X* dz, X* pa,
    int64 intermediate
) {
    A d_gate[V], d_up[V], scaled[V], dot = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const Activated<A> act = activate<sizeof(X) == 2>(activation, gate[i]);
        const A a = act.value * up[i];
        dot += da[i] * a;
        scaled[i] = p * a;
        d_gate[i] = p * da[i] * act.slope * up[i];
        d_up[i] = p * da[i] * act.value;
    }
    move.store(d_gate, dz);
    move.store(d_up, dz + intermediate);
    move.store(scaled, pa);
    return dot;
}
