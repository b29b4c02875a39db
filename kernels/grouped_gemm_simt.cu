// Grouped products of any type and any width, on the ordinary arithmetic units.
//
// The float32 path (true float32 products), the float64 path, and the path of 16-bit matrices whose widths do
// not divide by 8. A block of 256 threads computes a 64x64 tile, 4x4 a thread, 16 deep a step; the
// accumulators then stand in shared memory for the same epilogues as grouped_gemm_sm80.cu has.
//
// Defines: A_TYPE, B_TYPE, OUT_TYPE (codes of types.cuh); TRANSPOSE_A and TRANSPOSE_B for DENSE,
// TRANSPOSE_B for GEMM, ACTIVATION for GLU.

#include "common/epilogue.cuh"
#include "common/tile_scheduler.cuh"
#include "common/types.cuh"

using TypeA = type_of<A_TYPE>;
using TypeB = type_of<B_TYPE>;
using TypeOut = type_of<OUT_TYPE>;
constexpr bool IN_DOUBLE = A_TYPE == 1 || B_TYPE == 1 || OUT_TYPE == 1;
template <bool> struct AccumulatorType { using type = float; };
template <> struct AccumulatorType<true> { using type = double; };
using A = typename AccumulatorType<IN_DOUBLE>::type;

constexpr int TILE = 64;
constexpr int DEPTH = 16;
constexpr int THREADS = 256;
constexpr int PITCH = TILE + 4;

// One operand: element (i, k) of the tile, i along the tile and k along the contraction.
// Exactly one of the two strides is 1; threads run along that one.
template <class X> struct Operand {
    const X* base;
    int64 tile_stride, depth_stride;
    const int* tile_index;   // where the i-th row of the tile stands, or nullptr: at i
    const int* depth_index;  // where the k-th row of the contraction stands, or nullptr: at k
    int limit;               // i at and behind it are zero

    __device__ A read(int i, int k, int depth) const {
        if (i >= limit || k >= depth) return A(0);
        const int64 row = tile_index != nullptr ? tile_index[i] : i;
        const int64 column = depth_index != nullptr ? depth_index[k] : k;
        return A(widen(base[row * tile_stride + column * depth_stride]));
    }

    // shared[k][i]
    __device__ void copy(A (*shared)[PITCH], int step, int depth) const {
        const bool along_depth = depth_stride == 1;
#pragma unroll
        for (int j = 0; j < TILE * DEPTH / THREADS; ++j) {
            const int at = threadIdx.x + j * THREADS;
            const int i = along_depth ? at / DEPTH : at % TILE, k = along_depth ? at % DEPTH : at / TILE;
            shared[k][i] = read(i, step + k, depth);
        }
    }
};

// The tile's product over k in [begin, end), left in shared memory [TILE][PITCH].
__device__ A* multiply_tile(const Operand<TypeA>& a, const Operand<TypeB>& b, int begin, int end) {
    __shared__ A tile[TILE * PITCH];
    A(*left)[PITCH] = reinterpret_cast<A(*)[PITCH]>(tile);  // the operands share the result's room
    A(*right)[PITCH] = left + DEPTH;
    const int first_row = threadIdx.x / 16 * 4, first_column = threadIdx.x % 16 * 4;
    A acc[4][4] = {};
    for (int step = begin; step < end; step += DEPTH) {
        a.copy(left, step, end);
        b.copy(right, step, end);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            A rows[4], columns[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                rows[i] = left[k][first_row + i];
                columns[i] = right[k][first_column + i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) acc[i][j] += rows[i] * columns[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) tile[(first_row + i) * PITCH + first_column + j] = acc[i][j];
    __syncthreads();
    return tile;
}

#if defined(DENSE)

// out[m, n] (+)= sum_k a(m, k) b(n, k), with a stored [k, m] if TRANSPOSE_A else [m, k], and b stored [n, k] if
// TRANSPOSE_B else [k, n]. gridDim.y splits the contraction; each part goes to its own [rows, columns] of parts,
// which sum_parts adds in order.
extern "C" __global__ void __launch_bounds__(THREADS) dense_gemm(
    const TypeA* a, const TypeB* b, TypeOut* out, A* parts, int rows, int columns, int depth, int split_depth,
    int column_tiles, int accumulate
) {
    const int first_row = blockIdx.x / column_tiles * TILE, first_column = blockIdx.x % column_tiles * TILE;
    const Operand<TypeA> left = {
        a + int64(first_row) * (TRANSPOSE_A ? 1 : depth), TRANSPOSE_A ? 1 : depth, TRANSPOSE_A ? rows : 1,
        nullptr, nullptr, rows - first_row
    };
    const Operand<TypeB> right = {
        b + int64(first_column) * (TRANSPOSE_B ? depth : 1), TRANSPOSE_B ? depth : 1, TRANSPOSE_B ? 1 : columns,
        nullptr, nullptr, columns - first_column
    };
    const int begin = blockIdx.y * split_depth;
    const A* acc = multiply_tile(left, right, begin, min(begin + split_depth, depth));
    const int count = min(TILE, rows - first_row);
    const int64 at = int64(first_row) * columns + first_column;
    if (parts != nullptr)
        store_tile<A, A, 1, TILE, PITCH, THREADS>(
            acc, count, columns - first_column, parts + int64(blockIdx.y) * rows * columns + at, columns, false
        );
    else
        store_tile<A, TypeOut, 1, TILE, PITCH, THREADS>(
            acc, count, columns - first_column, out + at, columns, accumulate
        );
}

extern "C" __global__ void sum_parts(const A* parts, TypeOut* out, int64 size, int count, int accumulate) {
    for (int64 i = blockIdx.x * int64(blockDim.x) + threadIdx.x; i < size; i += int64(gridDim.x) * blockDim.x) {
        A sum = accumulate ? A(widen(out[i])) : A(0);
        for (int part = 0; part < count; ++part) sum += parts[part * size + i];
        narrow(sum, out[i]);
    }
}

#elif defined(GEMM)

extern "C" __global__ void __launch_bounds__(THREADS) grouped_gemm(
    const TypeA* a, const TypeB* b, const int* offsets, const int* row_index, TypeOut* out,
    int num_groups, int num_rows, int depth, int columns, int column_tiles
) {
    const RowTile tile = find_row_tile<TILE>(blockIdx.x / column_tiles, offsets, num_groups, num_rows);
    if (tile.count == 0) return;
    const int first_column = blockIdx.x % column_tiles * TILE;
    const bool nobodys = tile.group == num_groups;
    const TypeB* weights = b + (nobodys ? 0 : int64(tile.group) * depth * columns);
    const Operand<TypeA> left = {
        a + (row_index != nullptr ? 0 : int64(tile.first) * depth), depth, 1,
        row_index != nullptr ? row_index + tile.first : nullptr, nullptr, tile.count
    };
    const Operand<TypeB> right = {
        weights + int64(first_column) * (TRANSPOSE_B ? depth : 1), TRANSPOSE_B ? depth : 1,
        TRANSPOSE_B ? 1 : columns, nullptr, nullptr, columns - first_column
    };
    const A* acc = multiply_tile(left, right, 0, nobodys ? 0 : depth);
    store_tile<A, TypeOut, 1, TILE, PITCH, THREADS>(
        acc, tile.count, columns - first_column, out + int64(tile.first) * columns + first_column, columns, false
    );
}

#elif defined(WGRAD)

extern "C" __global__ void __launch_bounds__(THREADS) grouped_gemm_wgrad(
    const TypeA* a, const TypeB* b, const int* offsets, const int* a_index, const int* b_index, TypeOut* out,
    int a_columns, int b_columns, int column_tiles
) {
    const int first_row = blockIdx.x / column_tiles * TILE, first_column = blockIdx.x % column_tiles * TILE;
    const int group = blockIdx.y, begin = offsets[group], depth = offsets[group + 1] - begin;
    const Operand<TypeA> left = {
        a + (a_index != nullptr ? 0 : int64(begin) * a_columns) + first_row, 1, a_columns, nullptr,
        a_index != nullptr ? a_index + begin : nullptr, a_columns - first_row
    };
    const Operand<TypeB> right = {
        b + (b_index != nullptr ? 0 : int64(begin) * b_columns) + first_column, 1, b_columns, nullptr,
        b_index != nullptr ? b_index + begin : nullptr, b_columns - first_column
    };
    const A* acc = multiply_tile(left, right, 0, depth);
    store_tile<A, TypeOut, 1, TILE, PITCH, THREADS>(
        acc, min(TILE, a_columns - first_row), b_columns - first_column,
        out + (int64(group) * a_columns + first_row) * b_columns + first_column, b_columns, false
    );
}

#elif defined(GLU)

// A tile takes 32 gate columns, then the 32 up columns that belong to them.
constexpr int HALF = TILE / 2;
__device__ __forceinline__ int position_of(int column, bool up) { return column + (up ? HALF : 0); }

extern "C" __global__ void __launch_bounds__(THREADS) grouped_glu(
    const TypeA* x, const TypeB* w_up, const int* offsets, const int* row_index, TypeOut* z, TypeOut* a,
    int num_groups, int num_rows, int depth, int intermediate, int column_tiles
) {
    const RowTile tile = find_row_tile<TILE>(blockIdx.x / column_tiles, offsets, num_groups, num_rows);
    if (tile.count == 0) return;
    const int first_column = blockIdx.x % column_tiles * HALF;
    const bool nobodys = tile.group == num_groups;
    const TypeB* weights = w_up + (nobodys ? 0 : int64(tile.group) * 2 * intermediate * depth);
    // The tile's 64 rows of w_up; where there are no more columns, row 0 stands in and is not stored.
    __shared__ int weight_rows[TILE];
    if (threadIdx.x < TILE) {
        const int column = first_column + int(threadIdx.x) % HALF;
        weight_rows[threadIdx.x] = column < intermediate ? column + (threadIdx.x < HALF ? 0 : intermediate) : 0;
    }
    __syncthreads();
    const Operand<TypeA> left = {
        x + (row_index != nullptr ? 0 : int64(tile.first) * depth), depth, 1,
        row_index != nullptr ? row_index + tile.first : nullptr, nullptr, tile.count
    };
    const Operand<TypeB> right = {weights, depth, 1, weight_rows, nullptr, TILE};
    const A* acc = multiply_tile(left, right, 0, nobodys ? 0 : depth);
    store_glu_tile<ACTIVATION, A, TypeOut, 1, HALF, PITCH, THREADS>(
        acc, tile.count, intermediate - first_column,
        z != nullptr ? z + int64(tile.first) * 2 * intermediate + first_column : nullptr,
        a + int64(tile.first) * intermediate + first_column, intermediate, position_of
    );
}

extern "C" __global__ void __launch_bounds__(THREADS) grouped_glu_backward(
    const TypeA* dout, const TypeB* w_down, const int* offsets, const int* row_index, const A* row_weights,
    const TypeOut* z, TypeOut* dz, TypeOut* pa, A* dp_parts,
    int num_groups, int num_rows, int depth, int intermediate, int column_tiles
) {
    const RowTile tile = find_row_tile<TILE>(blockIdx.x / column_tiles, offsets, num_groups, num_rows);
    if (tile.count == 0) return;
    const int column_tile = blockIdx.x % column_tiles, first_column = column_tile * TILE;
    const bool nobodys = tile.group == num_groups;
    const TypeB* weights = w_down + (nobodys ? 0 : int64(tile.group) * depth * intermediate);
    const Operand<TypeA> left = {
        dout + (row_index != nullptr ? 0 : int64(tile.first) * depth), depth, 1,
        row_index != nullptr ? row_index + tile.first : nullptr, nullptr, tile.count
    };
    const Operand<TypeB> right = {
        weights + first_column, 1, intermediate, nullptr, nullptr, intermediate - first_column
    };
    const A* acc = multiply_tile(left, right, 0, nobodys ? 0 : depth);
    const int64 at = int64(tile.first) * 2 * intermediate + first_column;
    store_glu_gradient_tile<ACTIVATION, A, TypeOut, 1, TILE, PITCH, THREADS>(
        acc, tile.count, intermediate - first_column, z + at, row_weights + tile.first, dz + at,
        pa + int64(tile.first) * intermediate + first_column,
        dp_parts + int64(column_tile) * num_rows + tile.first, intermediate, nobodys
    );
}

#endif
