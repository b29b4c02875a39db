// A float32 matrix as bfloat16 terms, for tensor cores that multiply nothing wider.
//
// The terms of a number are its rounding to bfloat16, and the rounding of what that leaves. A row becomes its first
// terms followed by its second ones. The same launch writes where equal parts of the rows begin, as the offsets of
// groups.

#include "common/launch_order.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int WIDTH = 8;  // elements that a thread splits; divides the columns

extern "C" __global__ void __launch_bounds__(THREADS) split_terms(
    const float* from, bfloat16* terms, int* offsets, int num_rows, int columns, int num_parts, int part_rows
) {
    after_earlier_kernels();
    const int64 i = blockIdx.x * int64(THREADS) + threadIdx.x;
    if (i <= num_parts) offsets[i] = int(min(i * part_rows, int64(num_rows)));
    const int vectors = columns / WIDTH;
    const int64 row = i / vectors;
    if (row >= num_rows) return;
    const int column = int(i - row * vectors) * WIDTH;
    const auto low = load_vector<float, 4>(from + i * WIDTH), high = load_vector<float, 4>(from + i * WIDTH + 4);
    Vector<bfloat16, WIDTH> first, second;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
        const float x = j < 4 ? low.at[j] : high.at[j - 4];
        narrow(x, first.at[j]);
        narrow(x - widen(first.at[j]), second.at[j]);
    }
    bfloat16* to = terms + row * 2 * columns + column;
    store_vector(to, first);
    store_vector(to + columns, second);
}
