// What happens to a tile of accumulators once it stands in shared memory.
//
// Every function is called by all threads of the block and walks the tile V columns at a time, so that
// neighbouring threads touch neighbouring memory. Columns of a tile are given as functions of a chunk.
#pragma once

#include "activation.cuh"
#include "types.cuh"

template <class A, class X, int V> __device__ __forceinline__ Vector<X, V> narrow_vector(const A (&values)[V]) {
    Vector<X, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) narrow(values[i], out.at[i]);
    return out;
}

// out[row, column] = acc (+ out)
template <class A, class X, int V, int COLUMNS, int PITCH, int THREADS>
__device__ void store_tile(
    const A* acc, int rows, int columns, X* out, int64 pitch, bool accumulate
) {
    constexpr int CHUNKS = COLUMNS / V;
    for (int i = threadIdx.x; i < rows * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, column = i % CHUNKS * V;
        if (column >= columns) continue;
        X* to = out + row * pitch + column;
        A values[V];
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] = acc[row * PITCH + column + j];
        if (accumulate) {
            const Vector<X, V> old = load_vector<X, V>(to);
#pragma unroll
            for (int j = 0; j < V; ++j) values[j] += widen(old.at[j]);
        }
        store_vector<X, V>(to, narrow_vector<A, X, V>(values));
    }
}

// The tile holds HALF gate columns and the matching HALF up columns; `position` tells where.
template <int KIND, class A, class X, int V, int HALF, int PITCH, int THREADS, class Position>
__device__ void store_glu_tile(
    const A* acc, int rows, int columns, X* z, X* a, int64 intermediate, Position position
) {
    constexpr int CHUNKS = HALF / V;
    for (int i = threadIdx.x; i < rows * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, column = i % CHUNKS * V;
        if (column >= columns) continue;
        const A* gates = acc + row * PITCH + position(column, false);
        const A* ups = acc + row * PITCH + position(column, true);
        A gate[V], up[V], out[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            gate[j] = gates[j];
            up[j] = ups[j];
            out[j] = activate<KIND>(gate[j]).value * up[j];
        }
        if (z != nullptr) {
            X* to = z + row * 2 * intermediate + column;
            store_vector<X, V>(to, narrow_vector<A, X, V>(gate));
            store_vector<X, V>(to + intermediate, narrow_vector<A, X, V>(up));
        }
        store_vector<X, V>(a + row * intermediate + column, narrow_vector<A, X, V>(out));
    }
}

// The tile is da'; writes dz, p*a and the tile's part of dp = <da', a>. z, dz, pa and weights point at the
// tile's first row; dp at the tile's part of it. Rows that are nobody's get zeros whatever z holds.
template <int KIND, class A, class X, int V, int COLUMNS, int PITCH, int THREADS>
__device__ void store_glu_gradient_tile(
    const A* acc, int rows, int columns, const X* z, const A* weights, X* dz, X* pa, A* dp, int64 intermediate,
    bool nobodys
) {
    constexpr int LANES = COLUMNS / V < 32 ? COLUMNS / V : 32;  // threads that share a row
    constexpr int ROWS = THREADS / LANES;
    const int lane = threadIdx.x % LANES, end = nobodys ? 0 : min(columns, COLUMNS);
    if (nobodys) {
        const Vector<X, V> zeros = {};
        for (int i = threadIdx.x; i < rows * (COLUMNS / V); i += THREADS) {
            const int row = i / (COLUMNS / V), column = i % (COLUMNS / V) * V;
            if (column >= columns) continue;
            X* to = dz + row * 2 * intermediate + column;
            store_vector<X, V>(to, zeros);
            store_vector<X, V>(to + intermediate, zeros);
            store_vector<X, V>(pa + row * intermediate + column, zeros);
        }
    }
    for (int base = 0; base < rows; base += ROWS) {
        const int row = base + threadIdx.x / LANES;
        A dot = 0;
        if (row < rows) {
            const A p = weights[row];
            for (int column = lane * V; column < end; column += LANES * V) {
                const X* from = z + row * 2 * intermediate + column;
                const Vector<X, V> gates = load_vector<X, V>(from);
                const Vector<X, V> ups = load_vector<X, V>(from + intermediate);
                A d_gate[V], d_up[V], scaled[V];
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const A g = widen(gates.at[j]), u = widen(ups.at[j]);
                    const A da = acc[row * PITCH + column + j];
                    const Activated<A> act = activate<KIND>(g);
                    const A a = act.value * u;
                    dot += da * a;
                    d_gate[j] = p * da * u * act.slope;
                    d_up[j] = p * da * act.value;
                    scaled[j] = p * a;
                }
                X* to = dz + row * 2 * intermediate + column;
                store_vector<X, V>(to, narrow_vector<A, X, V>(d_gate));
                store_vector<X, V>(to + intermediate, narrow_vector<A, X, V>(d_up));
                store_vector<X, V>(pa + row * intermediate + column, narrow_vector<A, X, V>(scaled));
            }
        }
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
        if (lane == 0 && row < rows) dp[row] = dot;
    }
}
