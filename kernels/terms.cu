// A float32 matrix as bfloat16 terms, for tensor cores that multiply nothing wider.
//
// The terms of a number are its rounding to bfloat16, and the rounding of what that leaves. A row becomes its first
// terms followed by its second ones. The same launch writes where equal parts of the rows begin, as the offsets of
// groups.
//
// Defines: WIDTH, the elements that a thread splits: 8, or 4; it divides the columns.

#include "common/epilogue.cuh"
#include "common/launch_order.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ void note_offsets(int* offsets, int num_rows, int num_parts, int part_rows) {
    const int64 i = blockIdx.x * int64(THREADS) + threadIdx.x;
    if (i <= num_parts) offsets[i] = int(min(i * part_rows, int64(num_rows)));
}

__device__ __forceinline__ void store_terms(
    const float (&values)[WIDTH], bfloat16* terms, int64 row, int column, int columns
) {
    Vector<bfloat16, WIDTH> first, second;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
        narrow(values[j], first.at[j]);
        narrow(values[j] - widen(first.at[j]), second.at[j]);
    }
    bfloat16* to = terms + row * 2 * columns + column;
    store_vector(to, first);
    store_vector(to + columns, second);
}

extern "C" __global__ void __launch_bounds__(THREADS) split_terms(
    const float* from, bfloat16* terms, int* offsets, int num_rows, int columns, int num_parts, int part_rows
) {
    after_earlier_kernels();
    note_offsets(offsets, num_rows, num_parts, part_rows);
    const int64 i = blockIdx.x * int64(THREADS) + threadIdx.x;
    const int pieces = columns / WIDTH;
    const int64 row = i / pieces;
    if (row >= num_rows) return;
    float values[WIDTH];
    load_values(values, from + i * WIDTH);
    store_terms(values, terms, row, int(i - row * pieces) * WIDTH, columns);
}

// The same of a matrix that is zero but at topk_idx [num_rows, top_k], where it is `chosen` [num_rows, top_k]. A block
// has as many whole rows as its threads have pieces for.
extern "C" __global__ void __launch_bounds__(THREADS) chosen_terms(
    const float* chosen, const int* topk_idx, bfloat16* terms, int* offsets, int num_rows, int columns, int top_k,
    int num_parts, int part_rows
) {
    after_earlier_kernels();
    __shared__ __align__(16) float matrix[THREADS * WIDTH];
    const int pieces = columns / WIDTH, rows = THREADS / pieces;
    const int64 first = blockIdx.x * int64(rows);
    note_offsets(offsets, num_rows, num_parts, part_rows);
    float values[WIDTH] = {};
    store_values(values, matrix + threadIdx.x * WIDTH);
    __syncthreads();
    const int there = int(min(int64(rows), num_rows - first));
    for (int i = threadIdx.x; i < there * top_k; i += THREADS) {
        const int expert = topk_idx[first * top_k + i];
        const float value = chosen[first * top_k + i];
        if (uint32(expert) < uint32(columns)) matrix[i / top_k * columns + expert] = value;
    }
    __syncthreads();
    const int row = threadIdx.x / pieces;
    if (row >= there) return;
    load_values(values, matrix + threadIdx.x * WIDTH);
    store_terms(values, terms, first + row, threadIdx.x % pieces * WIDTH, columns);
}
