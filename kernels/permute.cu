// Rows moved between token order and expert order: the gather, and the gather-and-sum.
//
// Memory-bound: a thread takes one vector of columns, lanes next to each other take columns next to each
// other, and several loads are in flight. Compiled with -DX_TYPE= the rows' type and -DWIDTH= elements of a
// vector: 16 bytes where the width and the addresses divide by it, 1 elsewhere. combine with -DSUMS= vectors that a
// thread sums up, more of them where a token has few rows.
#include "common/launch_order.cuh"
#include "common/types.cuh"

using X = type_of<X_TYPE>;
using W = accumulator_of<X>;
using Columns = Vector<X, WIDTH>;

constexpr int THREADS = 256;
constexpr int COPIES = 4;  // vectors a thread copies
constexpr int LOADS = 8;   // vectors a thread reads before it adds them up

// Where a thread works: `1 << log_lanes` threads share a segment of a row, `segments` make the row.
struct Place {
    int64 row;
    int column;  // in vectors
};

__device__ __forceinline__ Place place(int log_lanes, uint32 segments, int vectors_per_thread) {
    const uint64 thread = uint64(blockIdx.x) * THREADS + threadIdx.x;
    const uint32 unit = uint32(thread >> log_lanes);
    const uint32 segment = unit % segments;
    const int lane = threadIdx.x & ((1 << log_lanes) - 1);
    return {unit / segments, int(segment << log_lanes) * vectors_per_thread + lane};
}

#if !defined(SUMS)

// out[r] = x[row_token[r]]; zeros at and past *num_kept and where row_token names no token. `columns` is the
// width in vectors.
extern "C" __global__ void __launch_bounds__(THREADS) permute(
    const X* x, const int* row_token, const int* num_kept, X* out, int64 num_tokens, int64 num_rows,
    int columns, int log_lanes, uint32 segments
) {
    after_earlier_kernels();
    const Place at = place(log_lanes, segments, COPIES);
    if (at.row >= num_rows) return;
    const int token = at.row < *num_kept ? row_token[at.row] : -1;
    const bool named = token >= 0 && token < num_tokens;
    Columns values[COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        const int column = at.column + (i << log_lanes);
        values[i] = Columns{};
        if (named && column < columns) {
            values[i] = load_vector<X, WIDTH>(x + (int64(token) * columns + column) * WIDTH);
        }
    }
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        const int column = at.column + (i << log_lanes);
        if (column < columns) store_vector(out + (at.row * columns + column) * WIDTH, values[i]);
    }
}

#else

// out[t] = added[t] + sum over k, ascending, of weights[t, k] * rows[token_rows[t, k]]; a slot that names no row adds
// nothing. weights may be NULL: ones; and added: zeros.
extern "C" __global__ void __launch_bounds__(THREADS) combine(
    const X* rows, const int* token_rows, const W* weights, const X* added, X* out, int64 num_tokens, int64 num_rows,
    int top_k, int columns, int log_lanes, uint32 segments
) {
    after_earlier_kernels();
    constexpr int STEP = LOADS / SUMS;  // rows at a time
    const Place at = place(log_lanes, segments, SUMS);
    if (at.row >= num_tokens || at.column >= columns) return;
    const int64 slot = at.row * top_k;
    W sums[SUMS][WIDTH] = {};
    if (added != nullptr) {
#pragma unroll
        for (int s = 0; s < SUMS; s++) {
            const int column = at.column + (s << log_lanes);
            if (s > 0 && column >= columns) continue;
            const Columns own = load_vector<X, WIDTH>(added + (at.row * columns + column) * WIDTH);
#pragma unroll
            for (int j = 0; j < WIDTH; j++) sums[s][j] = widen(own.at[j]);
        }
    }
    for (int first = 0; first < top_k; first += STEP) {
        W weight[STEP];
        Columns values[STEP][SUMS];
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            const int k = first + i, row = k < top_k ? token_rows[slot + k] : -1;
            const bool there = uint32(row) < uint32(num_rows);
            weight[i] = !there ? W(0) : weights != nullptr ? weights[slot + k] : W(1);
#pragma unroll
            for (int s = 0; s < SUMS; s++) {
                const int column = at.column + (s << log_lanes);
                values[i][s] = Columns{};
                if (there && (s == 0 || column < columns))
                    values[i][s] = load_vector<X, WIDTH>(rows + (int64(row) * columns + column) * WIDTH);
            }
        }
#pragma unroll
        for (int i = 0; i < STEP; i++)
#pragma unroll
            for (int s = 0; s < SUMS; s++)
#pragma unroll
                for (int j = 0; j < WIDTH; j++) sums[s][j] += weight[i] * widen(values[i][s].at[j]);
    }
#pragma unroll
    for (int s = 0; s < SUMS; s++) {
        const int column = at.column + (s << log_lanes);
        Columns sum;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) sum.at[j] = narrow_to<X>(sums[s][j]);
        if (s == 0 || column < columns) store_vector(out + (at.row * columns + column) * WIDTH, sum);
    }
}

#endif
