// A float32 matrix as bfloat16 terms, for tensor cores that multiply nothing wider.
//
// The terms of a number are its rounding to bfloat16, and the rounding of what that leaves. A row becomes its first
// terms followed by its second ones. The same launch writes where equal parts of the rows begin, as the offsets of
// groups.

#include "common/launch_order.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int WIDTH = 8;  // elements that a thread splits; divides the columns

// The piece of the matrix that is this thread's, and one of the offsets.
struct Piece {
    int64 row;
    int column;

    __device__ __forceinline__ Piece(int columns, int* offsets, int num_rows, int num_parts, int part_rows) {
        const int64 i = blockIdx.x * int64(THREADS) + threadIdx.x;
        if (i <= num_parts) offsets[i] = int(min(i * part_rows, int64(num_rows)));
        const int pieces = columns / WIDTH;
        row = i / pieces;
        column = int(i - row * pieces) * WIDTH;
    }
    __device__ __forceinline__ void store_terms(const float (&values)[WIDTH], bfloat16* terms, int columns) const {
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
};

extern "C" __global__ void __launch_bounds__(THREADS) split_terms(
    const float* from, bfloat16* terms, int* offsets, int num_rows, int columns, int num_parts, int part_rows
) {
    after_earlier_kernels();
    const Piece piece(columns, offsets, num_rows, num_parts, part_rows);
    if (piece.row >= num_rows) return;
    float values[WIDTH];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const auto four = load_vector<float, 4>(from + piece.row * columns + piece.column + 4 * half);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[4 * half + j] = four.at[j];
    }
    piece.store_terms(values, terms, columns);
}

// The same of a matrix that is zero but at topk_idx [num_rows, top_k], where it is `chosen` [num_rows, top_k].
extern "C" __global__ void __launch_bounds__(THREADS) chosen_terms(
    const float* chosen, const int* topk_idx, bfloat16* terms, int* offsets, int num_rows, int columns, int top_k,
    int num_parts, int part_rows
) {
    after_earlier_kernels();
    const Piece piece(columns, offsets, num_rows, num_parts, part_rows);
    if (piece.row >= num_rows) return;
    float values[WIDTH] = {};
#pragma unroll 4
    for (int k = 0; k < top_k; ++k) {
        const int at = topk_idx[piece.row * top_k + k] - piece.column;
        if (uint32(at) >= WIDTH) continue;
        const float value = chosen[piece.row * top_k + k];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j)
            if (j == at) values[j] = value;
    }
    piece.store_terms(values, terms, columns);
}
