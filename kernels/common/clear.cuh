// Zeros where a result has no product.
#pragma once

#include "types.cuh"
#include "warpgroup.cuh"

// ROWS by COLUMNS of them from row `first` on, by a warpgroup; so many rows and columns of the result exist.
template <int ROWS, int COLUMNS, class Out>
__device__ __forceinline__ void clear(Out* out, int first, int rows, int columns, int64 pitch) {
    constexpr int WIDTH = VECTOR_WIDTH<Out>, CHUNKS = COLUMNS / WIDTH;
    for (int i = threadIdx.x % WARPGROUP; i < ROWS * CHUNKS; i += WARPGROUP) {
        const int row = first + i / CHUNKS, column = i % CHUNKS * WIDTH;
        if (row < rows && column < columns) store_vector(out + row * pitch + column, Vector16<Out>{});
    }
}
