// Grouped products of 16-bit matrices on the tensor cores of sm_80 and newer (mma.sync).
//
// A block computes a 128x128 tile of one group: its operands come through a ring of shared-memory stages
// filled with cp.async, 64 deep along the contraction, gathered rows straight from where they are. The
// accumulators go to shared memory at the end, where the epilogue walks them in 16-byte pieces.
// All widths must divide by 8 and all arrays be 16-byte aligned; grouped_gemm_simt.cu has no such wish.
//
// Defines: X_TYPE (2 bfloat16, 3 float16); OUT_TYPE and TRANSPOSE_B for grouped_gemm; ACTIVATION for the GLUs.

#include "common/cp_async.cuh"
#include "common/epilogue.cuh"
#include "common/mma.cuh"
#include "common/tile_scheduler.cuh"
#include "common/types.cuh"

using X = type_of<X_TYPE>;

constexpr int TILE = 128;      // rows and columns of a tile
constexpr int DEPTH = 64;      // of a stage along the contraction
constexpr int STAGES = 3;
constexpr int THREADS = 256;   // 8 warps, 2 along the rows and 4 along the columns, 64x32 each
constexpr int OPERAND_BYTES = TILE * DEPTH * 2;
constexpr int STAGE_BYTES = 2 * OPERAND_BYTES;
constexpr int PITCH = TILE + 4;  // of the accumulators in shared memory: staggers the banks
static_assert(TILE * PITCH * 4 <= STAGES * STAGE_BYTES, "the accumulators reuse the stages");

// --- operands: a 128 x 64 (tile by contraction) piece in shared memory ---
// Either layout permutes the 16-byte chunks of a row by XOR with the row, so that neither the copies in nor
// the 8-row reads of ldmatrix meet in a bank.

// Contraction contiguous: 128 rows of 8 chunks. Each thread copies one chunk of rows t/8 + 32*i.
struct ContractionMajor {
    const X* rows[4];
    bool there[4];
    int width;  // of the contraction

    // row_of(i) is the tile's i-th row in memory, or nullptr behind the end
    template <class RowOf> __device__ void start(RowOf row_of, const X* anywhere, int contraction) {
        width = contraction;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const X* row = row_of(int(threadIdx.x) / 8 + 32 * i);
            there[i] = row != nullptr;
            rows[i] = there[i] ? row : anywhere;
        }
    }

    __device__ void copy(uint32 to, int step) {
        const int chunk = threadIdx.x % 8, k = step * DEPTH + chunk * 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = threadIdx.x / 8 + 32 * i;
            const bool copied = there[i] && k < width;
            copy16_async(to + row * 128 + ((chunk ^ (row & 7)) << 4), rows[i] + (copied ? k : 0), copied);
        }
    }

    // 16 tile rows from `first`, 16 deep from `k`: the order of an A fragment
    static __device__ void load_a(uint32 (&out)[4], uint32 from, int first, int k) {
        const int lane = threadIdx.x % 32, row = first + lane % 16, chunk = k / 8 + lane / 16;
        load_matrices(out, from + row * 128 + ((chunk ^ (row & 7)) << 4));
    }
    // the same piece in the order of two B fragments: (k low, k high) of 8 columns, then of the next 8
    static __device__ void load_b(uint32 (&out)[4], uint32 from, int first, int k) {
        const int lane = threadIdx.x % 32;
        const int row = first + lane % 8 + lane / 16 * 8, chunk = k / 8 + lane / 8 % 2;
        load_matrices(out, from + row * 128 + ((chunk ^ (row & 7)) << 4));
    }
};

// Tile columns contiguous: 64 rows of 16 chunks. Each thread copies one chunk of rows t/16 + 16*i.
// With an index the rows are gathered; it is read one step ahead of the copies that need it.
struct TileMajor {
    const X* base;
    const int* index;
    int64 pitch;
    int depth;    // rows of the contraction
    bool inside;  // whether this thread's columns exist
    int next[4];

    __device__ void start(const X* matrix, int64 row_pitch, const int* row_index, int rows, int first, int columns) {
        const int column = first + int(threadIdx.x) % 16 * 8;
        inside = column < columns;
        base = matrix + (inside ? column : 0);
        pitch = row_pitch;
        index = row_index;
        depth = rows;
        fetch(0);
    }

    __device__ void fetch(int step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = step * DEPTH + threadIdx.x / 16 + 16 * i;
            next[i] = row >= depth ? -1 : index != nullptr ? index[row] : row;
        }
    }

    __device__ void copy(uint32 to, int step) {
        const int chunk = threadIdx.x % 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = threadIdx.x / 16 + 16 * i;
            const bool copied = inside && next[i] >= 0;
            copy16_async(
                to + row * 256 + ((chunk ^ (row & 7)) << 4), base + (copied ? next[i] : 0) * pitch, copied
            );
        }
        fetch(step + 1);
    }

    static __device__ void load_a(uint32 (&out)[4], uint32 from, int first, int k) {
        const int lane = threadIdx.x % 32;
        const int row = k + lane % 8 + lane / 16 * 8, chunk = first / 8 + lane / 8 % 2;
        load_matrices_transposed(out, from + row * 256 + ((chunk ^ (row & 7)) << 4));
    }
    static __device__ void load_b(uint32 (&out)[4], uint32 from, int first, int k) {
        const int lane = threadIdx.x % 32;
        const int row = k + lane % 16, chunk = first / 8 + lane / 16;
        load_matrices_transposed(out, from + row * 256 + ((chunk ^ (row & 7)) << 4));
    }
};

// --- the product ---

// Leaves the tile's accumulators in shared memory, [TILE][PITCH] float, for all threads to read.
template <class A, class B> __device__ float* multiply_tile(A& a, B& b, int contraction) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32 stages = shared_address(shared);
    const int steps = (contraction + DEPTH - 1) / DEPTH;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
    float acc[4][4][4] = {};

#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) {
            a.copy(stages + step * STAGE_BYTES, step);
            b.copy(stages + step * STAGE_BYTES + OPERAND_BYTES, step);
        }
        commit_copies();
    }
    int reading = 0, writing = STAGES - 1;
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();  // this stage has arrived for all, and all have left the one to be filled next
        if (step + STAGES - 1 < steps) {
            a.copy(stages + writing * STAGE_BYTES, step + STAGES - 1);
            b.copy(stages + writing * STAGE_BYTES + OPERAND_BYTES, step + STAGES - 1);
        }
        commit_copies();
        const uint32 from_a = stages + reading * STAGE_BYTES, from_b = from_a + OPERAND_BYTES;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            uint32 fragments_a[4][4], fragments_b[2][4];
#pragma unroll
            for (int m = 0; m < 4; ++m) A::load_a(fragments_a[m], from_a, warp_row + 16 * m, k);
#pragma unroll
            for (int n = 0; n < 2; ++n) B::load_b(fragments_b[n], from_b, warp_column + 16 * n, k);
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n)
                    multiply_add<X>(
                        acc[m][n], fragments_a[m], fragments_b[n / 2][n % 2 * 2], fragments_b[n / 2][n % 2 * 2 + 1]
                    );
        }
        reading = reading + 1 == STAGES ? 0 : reading + 1;
        writing = writing + 1 == STAGES ? 0 : writing + 1;
    }
    wait_for_copies<0>();
    __syncthreads();

    float* tile = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            float* to = tile + (warp_row + 16 * m + lane / 4) * PITCH + warp_column + 8 * n + lane % 4 * 2;
            *reinterpret_cast<float2*>(to) = make_float2(acc[m][n][0], acc[m][n][1]);
            *reinterpret_cast<float2*>(to + 8 * PITCH) = make_float2(acc[m][n][2], acc[m][n][3]);
        }
    __syncthreads();
    return tile;
}

// --- entry points: a block a tile; tiles of one row tile are neighbours and share its rows in L2 ---

#if defined(TRANSPOSE_B)

// out[r, n] = sum_k a[index[r], k] b[e][n, k]   (TRANSPOSE_B 1)   or   b[e][k, n]   (0)
extern "C" __global__ void __launch_bounds__(THREADS, 2) grouped_gemm(
    const X* a, const X* b, const int* offsets, const int* row_index, type_of<OUT_TYPE>* out,
    int num_groups, int num_rows, int depth, int columns, int column_tiles
) {
    const RowTile tile = find_row_tile<TILE>(blockIdx.x / column_tiles, offsets, num_groups, num_rows);
    if (tile.count == 0) return;
    const int first_column = blockIdx.x % column_tiles * TILE;
    const bool nobodys = offsets != nullptr && tile.group == num_groups;
    const X* weights = b + (nobodys ? 0 : int64(tile.group) * depth * columns);
    ContractionMajor rows;
    rows.start(
        [&](int i) -> const X* {
            if (nobodys || i >= tile.count) return nullptr;
            const int row = tile.first + i;
            return a + int64(row_index != nullptr ? row_index[row] : row) * depth;
        },
        a, depth
    );
#if TRANSPOSE_B
    ContractionMajor other;
    other.start(
        [&](int i) -> const X* {
            const int column = first_column + i;
            return column < columns ? weights + int64(column) * depth : nullptr;
        },
        b, depth
    );
#else
    TileMajor other;
    other.start(weights, columns, nullptr, depth, first_column, columns);
#endif
    const float* acc = multiply_tile(rows, other, nobodys ? 0 : depth);
    store_tile<float, type_of<OUT_TYPE>, 8, TILE, PITCH, THREADS>(
        acc, tile.count, columns - first_column, out + int64(tile.first) * columns + first_column, columns, false
    );
}

#elif defined(WGRAD)

// out[e][m, n] = sum over the rows r of e of a[a_index[r], m] b[b_index[r], n]
extern "C" __global__ void __launch_bounds__(THREADS, 2) grouped_gemm_wgrad(
    const X* a, const X* b, const int* offsets, const int* a_index, const int* b_index, X* out,
    int a_columns, int b_columns, int column_tiles
) {
    const int first_row = blockIdx.x / column_tiles * TILE, first_column = blockIdx.x % column_tiles * TILE;
    const int group = blockIdx.y, begin = offsets[group], depth = offsets[group + 1] - begin;
    TileMajor left, right;
    left.start(
        a_index != nullptr ? a : a + int64(begin) * a_columns, a_columns,
        a_index != nullptr ? a_index + begin : nullptr, depth, first_row, a_columns
    );
    right.start(
        b_index != nullptr ? b : b + int64(begin) * b_columns, b_columns,
        b_index != nullptr ? b_index + begin : nullptr, depth, first_column, b_columns
    );
    const float* acc = multiply_tile(left, right, depth);
    store_tile<float, X, 8, TILE, PITCH, THREADS>(
        acc, min(TILE, a_columns - first_row), b_columns - first_column,
        out + (int64(group) * a_columns + first_row) * b_columns + first_column, b_columns, false
    );
}

#elif defined(GLU)

// A tile takes 64 gate columns and the 64 up columns that belong to them: 16 of each in turn.
constexpr int HALF = TILE / 2;
__device__ __forceinline__ int position_of(int column, bool up) { return column / 16 * 32 + column % 16 + (up ? 16 : 0); }

// z[r] = w_up[e] x[index[r]], a = act(gate) * up
extern "C" __global__ void __launch_bounds__(THREADS, 2) grouped_glu(
    const X* x, const X* w_up, const int* offsets, const int* row_index, X* z, X* a,
    int num_groups, int num_rows, int depth, int intermediate, int column_tiles
) {
    const RowTile tile = find_row_tile<TILE>(blockIdx.x / column_tiles, offsets, num_groups, num_rows);
    if (tile.count == 0) return;
    const int first_column = blockIdx.x % column_tiles * HALF;
    const bool nobodys = tile.group == num_groups;
    const X* weights = w_up + (nobodys ? 0 : int64(tile.group) * 2 * intermediate * depth);
    ContractionMajor rows, other;
    rows.start(
        [&](int i) -> const X* {
            if (nobodys || i >= tile.count) return nullptr;
            const int row = tile.first + i;
            return x + int64(row_index != nullptr ? row_index[row] : row) * depth;
        },
        x, depth
    );
    other.start(
        [&](int i) -> const X* {
            const int column = first_column + i / 32 * 16 + i % 16;
            return column < intermediate ? weights + int64(column + (i % 32 < 16 ? 0 : intermediate)) * depth : nullptr;
        },
        w_up, depth
    );
    const float* acc = multiply_tile(rows, other, nobodys ? 0 : depth);
    store_glu_tile<ACTIVATION, float, X, 8, HALF, PITCH, THREADS>(
        acc, tile.count, intermediate - first_column,
        z != nullptr ? z + int64(tile.first) * 2 * intermediate + first_column : nullptr,
        a + int64(tile.first) * intermediate + first_column, intermediate, position_of
    );
}

// da'[r] = w_down[e]^T dout[index[r]]; from it dz, p*a, and this column tile's part of dp
extern "C" __global__ void __launch_bounds__(THREADS, 2) grouped_glu_backward(
    const X* dout, const X* w_down, const int* offsets, const int* row_index, const float* row_weights,
    const X* z, X* dz, X* pa, float* dp_parts,
    int num_groups, int num_rows, int depth, int intermediate, int column_tiles
) {
    const RowTile tile = find_row_tile<TILE>(blockIdx.x / column_tiles, offsets, num_groups, num_rows);
    if (tile.count == 0) return;
    const int column_tile = blockIdx.x % column_tiles, first_column = column_tile * TILE;
    const bool nobodys = tile.group == num_groups;
    const X* weights = w_down + (nobodys ? 0 : int64(tile.group) * depth * intermediate);
    ContractionMajor rows;
    rows.start(
        [&](int i) -> const X* {
            if (nobodys || i >= tile.count) return nullptr;
            const int row = tile.first + i;
            return dout + int64(row_index != nullptr ? row_index[row] : row) * depth;
        },
        dout, depth
    );
    TileMajor other;
    other.start(weights, intermediate, nullptr, depth, first_column, intermediate);
    const float* acc = multiply_tile(rows, other, nobodys ? 0 : depth);
    const int64 at = int64(tile.first) * intermediate + first_column;
    store_glu_gradient_tile<ACTIVATION, float, X, 8, TILE, PITCH, THREADS>(
        acc, tile.count, intermediate - first_column,
        z + int64(tile.first) * 2 * intermediate + first_column, row_weights + tile.first,
        dz + int64(tile.first) * 2 * intermediate + first_column, pa + at,
        dp_parts + int64(column_tile) * num_rows + tile.first, intermediate, nobodys
    );
}

#endif
