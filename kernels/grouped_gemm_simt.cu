// Grouped products of any type and any width, on the ordinary arithmetic units.
//
// The float32 path (true float32 products), the float64 path, and the path of 16-bit matrices whose widths do
// not divide by 8. A block of 256 threads computes a 128x128 tile, 8x8 a thread, through two buffers in
// shared memory: one is filled while the other is multiplied.
//
// Defines: A_TYPE, B_TYPE, OUT_TYPE (codes of types.cuh). Then one of
//   DENSE, TRANSPOSE_A=0|1, TRANSPOSE_B=0|1   dense_gemm
//   SUM                                       sum_parts
//   GEMM, TRANSPOSE_B=0|1                     grouped_gemm
//   WGRAD, ACCUMULATE=0|1                     grouped_gemm_wgrad
//   GLU                                       grouped_glu
//   GLU_BACKWARD                              grouped_glu_backward
// `vectors` says that every width divides by 4 and every array is aligned to 16 bytes.

#include "common/epilogue.cuh"
#include "common/launch_order.cuh"
#include "common/tile_scheduler.cuh"
#include "common/types.cuh"

using TypeA = type_of<A_TYPE>;
using TypeB = type_of<B_TYPE>;
using TypeOut = type_of<OUT_TYPE>;
constexpr bool IN_DOUBLE = A_TYPE == 1 || B_TYPE == 1 || OUT_TYPE == 1;
template <bool> struct AccumulatorType { using type = float; };
template <> struct AccumulatorType<true> { using type = double; };
using A = typename AccumulatorType<IN_DOUBLE>::type;

constexpr int TILE = 128;
constexpr int DEPTH = 8;
constexpr int THREADS = 256;
constexpr int V = 4;                       // neighbours that are moved as one
constexpr int COPIES = TILE * DEPTH / V / THREADS;
constexpr int PITCH = TILE + V;

// One operand: element (i, k), i along the tile and k along the contraction, is outer * pitch + inner behind
// base, where the contraction is the inner one if ALONG_DEPTH. With an index the outer ones are gathered.
template <class X, bool ALONG_DEPTH> struct Operand {
    const X* base;
    int64 pitch;
    const int* index;
    int limit;  // i at and behind it are zero
    bool vectors;
    A held[COPIES][V];

    // A thread takes V inner neighbours, COPIES times. Threads run along the inner axis.
    static __device__ __forceinline__ int tile_place(int j) {
        const int at = threadIdx.x + j * THREADS;
        return ALONG_DEPTH ? at / (DEPTH / V) : at % (TILE / V) * V;
    }
    static __device__ __forceinline__ int depth_place(int j) {
        const int at = threadIdx.x + j * THREADS;
        return ALONG_DEPTH ? at % (DEPTH / V) * V : at / (TILE / V);
    }

    // reads the step at `begin`; k at and behind `end` are zero
    __device__ __forceinline__ void fetch(int begin, int end) {
#pragma unroll
        for (int j = 0; j < COPIES; ++j) {
            const int i = tile_place(j), k = begin + depth_place(j);
            const int outer = ALONG_DEPTH ? i : k, inner = ALONG_DEPTH ? k : i;
            const int count = outer < (ALONG_DEPTH ? limit : end) ? (ALONG_DEPTH ? end : limit) - inner : 0;
#pragma unroll
            for (int v = 0; v < V; ++v) held[j][v] = 0;
            if (count <= 0) continue;
            const X* from = base + (index != nullptr ? index[outer] : outer) * pitch + inner;
            First{count, vectors}.load(held[j], from);
        }
    }

    __device__ __forceinline__ void store(A (*shared)[PITCH]) const {
#pragma unroll
        for (int j = 0; j < COPIES; ++j) {
            const int i = tile_place(j), k = depth_place(j);
            if constexpr (ALONG_DEPTH) {
#pragma unroll
                for (int v = 0; v < V; ++v) shared[k + v][i] = held[j][v];
            } else {
                store_values(held[j], &shared[k][i]);
            }
        }
    }
};

// Eight warps, four along the rows, take 32x64 each. A thread's 8 rows are two runs of 4, 16 apart; its 8
// columns are two runs of 4, 32 apart: a warp's reads of either operand then fit one pass of shared memory.
using Accumulators = A[8][8];
constexpr int WARP_COLUMNS = 64;
__device__ __forceinline__ int row_of(int i) {
    return threadIdx.x / 64 * 32 + threadIdx.x % 32 / 8 * 4 + i % 4 + i / 4 * 16;
}
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 2 * WARP_COLUMNS; }
__device__ __forceinline__ int lane_column() { return threadIdx.x % 8 * 4; }

// The tile's product over k in [begin, end)
template <class Left, class Right>
__device__ __forceinline__ void multiply_tile(Accumulators& acc, Left& a, Right& b, int begin, int end) {
    __shared__ __align__(16) A left[2][DEPTH][PITCH], right[2][DEPTH][PITCH];
    if (begin >= end) return;
    a.fetch(begin, end);
    b.fetch(begin, end);
    a.store(left[0]);
    b.store(right[0]);
    int reading = 0;
    for (int step = begin; step < end; step += DEPTH, reading ^= 1) {
        __syncthreads();
        const bool more = step + DEPTH < end;
        if (more) {
            a.fetch(step + DEPTH, end);
            b.fetch(step + DEPTH, end);
        }
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            A rows[2][4], columns[2][4];
#pragma unroll
            for (int run = 0; run < 2; ++run) {
                load_values(rows[run], &left[reading][k][row_of(4 * run)]);
                load_values(columns[run], &right[reading][k][warp_column() + lane_column() + 32 * run]);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) acc[i][j] += rows[i / 4][i % 4] * columns[j / 4][j % 4];
        }
        if (more) {
            a.store(left[reading ^ 1]);
            b.store(right[reading ^ 1]);
        }
    }
}

// --- epilogues ---

// One of the two runs of a row.
struct Run {
    A at[V];
};
__device__ __forceinline__ Run run_of(const A (&values)[8], int run) {
    Run out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.at[v] = values[V * run + v];
    return out;
}

// out points at the tile's first element; so many of its rows and columns exist
template <class Out>
__device__ __forceinline__ void store_tile(
    const Accumulators& acc, int rows, int columns, Out* out, int64 pitch, bool vectors, bool accumulate
) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int run = 0; run < 2; ++run) {
            const int column = warp_column() + lane_column() + 32 * run;
            if (row_of(i) >= rows || column >= columns) continue;
            const First move = {columns - column, vectors};
            Out* to = out + row_of(i) * pitch + column;
            Run sum = run_of(acc[i], run), old = {};
            if (accumulate) move.load(old.at, to);
#pragma unroll
            for (int v = 0; v < V; ++v) sum.at[v] += old.at[v];
            move.store(sum.at, to);
        }
}

// --- entry points ---

// The rows of a tile, gathered where there is an index; none of those behind the last group are read.
template <class X>
__device__ __forceinline__ Operand<X, true> gathered_rows(
    const X* a, const int* row_index, const Tile& tile, int num_groups, int depth, bool vectors
) {
    const int rows = tile.group == num_groups ? 0 : tile.count;
    if (row_index != nullptr) return {a, depth, row_index + tile.first, rows, vectors};
    return {a + int64(tile.first) * depth, depth, nullptr, rows, vectors};
}

#if defined(DENSE)

// out[m, n] (+)= sum_k a(m, k) b(k, n), with a stored [k, m] if TRANSPOSE_A else [m, k], and b stored [n, k]
// if TRANSPOSE_B else [k, n]. gridDim.y splits the contraction, without `accumulate`; each part goes to its own
// [rows, columns] of parts, which sum_parts adds in order.
extern "C" __global__ void __launch_bounds__(THREADS, IN_DOUBLE ? 1 : 2) dense_gemm(
    const TypeA* a, const TypeB* b, TypeOut* out, A* parts, int rows, int columns, int depth, int split_depth,
    int column_tiles, int accumulate, int vectors
) {
    after_earlier_kernels();
    const int first_row = blockIdx.x / column_tiles * TILE, first_column = blockIdx.x % column_tiles * TILE;
    Operand<TypeA, !TRANSPOSE_A> left = {
        a + int64(first_row) * (TRANSPOSE_A ? 1 : depth), TRANSPOSE_A ? rows : depth, nullptr,
        rows - first_row, vectors != 0
    };
    Operand<TypeB, TRANSPOSE_B> right = {
        b + int64(first_column) * (TRANSPOSE_B ? depth : 1), TRANSPOSE_B ? depth : columns, nullptr,
        columns - first_column, vectors != 0
    };
    const int begin = blockIdx.y * split_depth;
    Accumulators acc = {};
    multiply_tile(acc, left, right, begin, min(begin + split_depth, depth));
    const int64 at = int64(first_row) * columns + first_column;
    if (parts != nullptr)
        store_tile(
            acc, rows - first_row, columns - first_column, parts + int64(blockIdx.y) * rows * columns + at,
            columns, vectors, false
        );
    else
        store_tile(acc, rows - first_row, columns - first_column, out + at, columns, vectors, accumulate);
}

#elif defined(SUM)

// out[i] = the sum over `count` parts, in order
extern "C" __global__ void sum_parts(const A* parts, TypeOut* out, int64 size, int count) {
    after_earlier_kernels();
    const int64 stride = int64(gridDim.x) * blockDim.x;
    for (int64 i = blockIdx.x * int64(blockDim.x) + threadIdx.x; i < size; i += stride) {
        A sum = 0;
        for (int part = 0; part < count; ++part) sum += parts[part * size + i];
        narrow(sum, out[i]);
    }
}

#elif defined(GEMM)

extern "C" __global__ void __launch_bounds__(THREADS, IN_DOUBLE ? 1 : 2) grouped_gemm(
    const TypeA* a, const TypeB* b, const int* offsets, const int* row_index, TypeOut* out,
    int num_groups, int num_rows, int chunks, int chunk, int depth, int columns, int column_tiles, int vectors
) {
    after_earlier_kernels();
    const GroupRows groups = {offsets, num_rows, chunks, chunk};
    const Tile tile = find_tile<TILE>(blockIdx.x, groups, num_groups, column_tiles);
    if (tile.count == 0) return;
    const int first_column = tile.column * TILE;
    const bool nobodys = tile.group == num_groups;
    const TypeB* weights = b + (nobodys ? 0 : int64(tile.group) * depth * columns);
    Operand<TypeA, true> left = gathered_rows(a, row_index, tile, num_groups, depth, vectors);
    Operand<TypeB, TRANSPOSE_B> right = {
        weights + int64(first_column) * (TRANSPOSE_B ? depth : 1), TRANSPOSE_B ? depth : columns, nullptr,
        columns - first_column, vectors != 0
    };
    Accumulators acc = {};
    multiply_tile(acc, left, right, 0, nobodys ? 0 : depth);
    store_tile(
        acc, tile.count, columns - first_column, out + int64(tile.first) * columns + first_column, columns,
        vectors, false
    );
}

#elif defined(WGRAD)

// out[e][m, n] (+)= scale * sum over the rows r of e of a[a_index[r], m] b[b_index[r], n]
extern "C" __global__ void __launch_bounds__(THREADS, IN_DOUBLE ? 1 : 2) grouped_gemm_wgrad(
    const TypeA* a, const TypeB* b, const int* offsets, const int* a_index, const int* b_index, TypeOut* out,
    int chunks, int a_columns, int b_columns, int row_tiles, int column_tiles, double scale, int vectors
) {
    after_earlier_kernels();
    const Place place = place_in_panels(blockIdx.x, row_tiles, column_tiles);
    const int first_row = place.row * TILE, first_column = place.column * TILE;
    const int group = blockIdx.y;
    const int begin = offsets[group * chunks], depth = offsets[(group + 1) * chunks] - begin;
    Operand<TypeA, false> left = {
        a + (a_index != nullptr ? 0 : int64(begin) * a_columns) + first_row, a_columns,
        a_index != nullptr ? a_index + begin : nullptr, a_columns - first_row, vectors != 0
    };
    Operand<TypeB, false> right = {
        b + (b_index != nullptr ? 0 : int64(begin) * b_columns) + first_column, b_columns,
        b_index != nullptr ? b_index + begin : nullptr, b_columns - first_column, vectors != 0
    };
    Accumulators acc = {};
    multiply_tile(acc, left, right, 0, depth);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[i][j] *= A(scale);
    store_tile(
        acc, a_columns - first_row, b_columns - first_column,
        out + (int64(group) * a_columns + first_row) * b_columns + first_column, b_columns, vectors, ACCUMULATE
    );
}

#elif defined(GLU)

// A warp takes 32 gate columns and the 32 up columns that belong to them.
extern "C" __global__ void __launch_bounds__(THREADS, IN_DOUBLE ? 1 : 2) grouped_glu(
    const TypeA* x, const TypeB* w_up, const int* offsets, const int* row_index, TypeOut* z, TypeOut* a,
    int num_groups, int num_rows, int chunks, int chunk, int depth, int intermediate, int column_tiles, int vectors, int activation
) {
    after_earlier_kernels();
    const GroupRows groups = {offsets, num_rows, chunks, chunk};
    const Tile tile = find_tile<TILE>(blockIdx.x, groups, num_groups, column_tiles);
    if (tile.count == 0) return;
    const int first_column = tile.column * (TILE / 2);
    const bool nobodys = tile.group == num_groups;
    const TypeB* weights = w_up + (nobodys ? 0 : int64(tile.group) * 2 * intermediate * depth);
    // The tile's rows of w_up; where there are no more columns, row 0 stands in and is not stored.
    __shared__ int weight_rows[TILE];
    for (int i = threadIdx.x; i < TILE; i += THREADS) {
        const int column = first_column + i / 64 * 32 + i % 32;
        weight_rows[i] = column < intermediate ? column + i / 32 % 2 * intermediate : 0;
    }
    __syncthreads();
    Operand<TypeA, true> left = gathered_rows(x, row_index, tile, num_groups, depth, vectors);
    Operand<TypeB, true> right = {weights, depth, weight_rows, TILE, vectors != 0};
    Accumulators acc = {};
    multiply_tile(acc, left, right, 0, nobodys ? 0 : depth);
    const int column = first_column + warp_column() / 2 + lane_column();
    if (column >= intermediate) return;
    const First move = {intermediate - column, vectors != 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (row_of(i) >= tile.count) continue;
        const int64 at = int64(tile.first) + row_of(i);
        store_glu(
            move, activation, run_of(acc[i], 0).at, run_of(acc[i], 1).at,
            z != nullptr ? z + at * 2 * intermediate + column : nullptr, a + at * intermediate + column,
            intermediate
        );
    }
}

#elif defined(GLU_BACKWARD)

// da'[r] = w_down[e]^T dout[row_index[r]]; from it dz, p*a, and for each 64 columns their part of dp
extern "C" __global__ void __launch_bounds__(THREADS, IN_DOUBLE ? 1 : 2) grouped_glu_backward(
    const TypeA* dout, const TypeB* w_down, const int* offsets, const int* row_index, const A* row_weights,
    const TypeOut* z, TypeOut* dz, TypeOut* pa, A* dp_parts,
    int num_groups, int num_rows, int chunks, int chunk, int depth, int intermediate, int column_tiles, int vectors, int activation
) {
    after_earlier_kernels();
    const GroupRows groups = {offsets, num_rows, chunks, chunk};
    const Tile tile = find_tile<TILE>(blockIdx.x, groups, num_groups, column_tiles);
    if (tile.count == 0) return;
    const int first_column = tile.column * TILE;
    const bool nobodys = tile.group == num_groups;
    const TypeB* weights = w_down + (nobodys ? 0 : int64(tile.group) * depth * intermediate);
    Operand<TypeA, true> left = gathered_rows(dout, row_index, tile, num_groups, depth, vectors);
    Operand<TypeB, false> right = {
        weights + first_column, intermediate, nullptr, intermediate - first_column, vectors != 0
    };
    Accumulators acc = {};
    multiply_tile(acc, left, right, 0, nobodys ? 0 : depth);
    const int first_of_warp = first_column + warp_column();
    if (first_of_warp >= intermediate) return;
    A* parts = dp_parts + int64(first_of_warp / WARP_COLUMNS) * num_rows;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int64 at = int64(tile.first) + row_of(i);
        A dot = 0;
        if (row_of(i) < tile.count) {
            const A p = nobodys ? A(0) : row_weights[at];
#pragma unroll
            for (int run = 0; run < 2; ++run) {
                const int column = first_of_warp + lane_column() + 32 * run;
                if (column >= intermediate) continue;
                const int64 z_at = at * 2 * intermediate + column;
                const First move = {intermediate - column, vectors != 0};
                Run gate = {}, up = {};  // nobody's rows get zeros, whatever z holds
                if (!nobodys) {
                    move.load(gate.at, z + z_at);
                    move.load(up.at, z + z_at + intermediate);
                }
                dot += store_glu_gradient(
                    move, activation, run_of(acc[i], run).at, p, gate.at, up.at, dz + z_at,
                    pa + at * intermediate + column, intermediate
                );
            }
        }
        for (int lanes = 1; lanes < 8; lanes *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
        if (row_of(i) < tile.count && threadIdx.x % 8 == 0) parts[at] = dot;
    }
}

#endif
