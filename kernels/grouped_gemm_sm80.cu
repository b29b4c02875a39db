// Grouped products of 16-bit matrices on the tensor cores of sm_80 and newer (mma.sync).
//
// A block computes a tile of 128 rows of one group, a warp 64x64 of it: its operands come through a ring of
// shared-memory stages filled with cp.async, gathered rows straight from where they are. The epilogues work
// on the accumulators in registers. All widths must divide by 8 and all arrays be 16-byte aligned;
// grouped_gemm_simt.cu has no such wish.
//
// Defines: X_TYPE (code of types.cuh); TILE_COLUMNS: 256, for long contractions of wide matrices, or 128, of
// which two blocks share a multiprocessor and hide each other's start and end. Then one of
//   TRANSPOSE_B=0|1                   grouped_gemm
//   WGRAD, OUT_TYPE, ACCUMULATE=0|1   grouped_gemm_wgrad
//   GLU, ACTIVATION                   grouped_glu
//   GLU_BACKWARD, ACTIVATION          grouped_glu_backward

#include "common/cp_async.cuh"
#include "common/dynamic_shared.cuh"
#include "common/epilogue.cuh"
#include "common/launch_order.cuh"
#include "common/mma.cuh"
#include "common/quad.cuh"
#include "common/tile_scheduler.cuh"
#include "common/types.cuh"

using X = type_of<X_TYPE>;

constexpr int TILE_ROWS = 128;
constexpr int WARP_TILE = 64;
constexpr int WARP_COLUMNS = TILE_COLUMNS / WARP_TILE;
constexpr int THREADS = 32 * (TILE_ROWS / WARP_TILE) * WARP_COLUMNS;
constexpr int BLOCKS = TILE_COLUMNS == 128 ? 2 : 1;  // on a multiprocessor
constexpr int DEPTH = 32;                            // of a stage along the contraction
constexpr int STAGES = 4;
constexpr int OPERAND_A_BYTES = TILE_ROWS * DEPTH * 2;
constexpr int STAGE_BYTES = OPERAND_A_BYTES + TILE_COLUMNS * DEPTH * 2;

// --- operands: SIZE x 32 (tile by contraction) pieces in shared memory ---
// Either layout permutes its 16-byte chunks by XOR with the row, so that neither the copies in nor the 8-row
// reads of ldmatrix meet in a bank. copy() is to be called for one step after the other.

// Contraction contiguous: SIZE rows of 4 chunks.
template <int SIZE> struct ContractionMajor {
    static constexpr int COPIES = SIZE * 4 / THREADS, STRIDE = THREADS / 4;
    const X* rows[COPIES];  // at this thread's chunk of the next step
    uint32 there;           // a bit a row: it exists
    int left;               // contraction from this thread's chunk on
    uint32 target;

    // row_of(i) is the tile's i-th row in memory, or nullptr where there is none
    template <class RowOf> __device__ ContractionMajor(RowOf row_of, const X* anywhere, int contraction) {
        const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
        there = 0;
        left = contraction - chunk * 8;
        target = row * 64 + ((chunk ^ (row / 2 & 3)) << 4);
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const X* from = row_of(row + STRIDE * i);
            there |= uint32(from != nullptr) << i;
            rows[i] = (from != nullptr ? from : anywhere) + chunk * 8;
        }
    }

    __device__ __forceinline__ void copy(uint32 stage) {
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            copy16_async(stage + target + i * STRIDE * 64, rows[i], (there >> i & 1) && left > 0);
            rows[i] += DEPTH;
        }
        left -= DEPTH;
    }

    // 16 tile rows from `first`, 16 deep from `k`: the order of an A fragment
    static __device__ __forceinline__ void load_a(uint32 (&out)[4], uint32 stage, int first, int k) {
        const int lane = threadIdx.x % 32, row = lane % 16, chunk = k / 8 + lane / 16;
        load_matrices(out, stage + first * 64 + row * 64 + ((chunk ^ (row / 2 & 3)) << 4));
    }
    // the same piece in the order of two B fragments: (k low, k high) of 8 columns, then of the next 8
    static __device__ __forceinline__ void load_b(uint32 (&out)[4], uint32 stage, int first, int k) {
        const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, chunk = k / 8 + lane / 8 % 2;
        load_matrices(out, stage + first * 64 + row * 64 + ((chunk ^ (row / 2 & 3)) << 4));
    }
};

// Tile columns contiguous: 32 rows of SIZE / 8 chunks.
template <int SIZE> struct TileMajor {
    static constexpr int COPIES = SIZE * 4 / THREADS, CHUNKS = SIZE / 8, STRIDE = THREADS / CHUNKS;

    static __device__ __forceinline__ int row() { return threadIdx.x / CHUNKS; }  // this thread's first of a step
    static __device__ __forceinline__ int column() { return threadIdx.x % CHUNKS * 8; }
    // where this thread's first copy goes in a stage; the others, so far apart each
    static __device__ __forceinline__ uint32 first_target() {
        return row() * SIZE * 2 + ((column() / 8 ^ (row() & 7)) << 4);
    }
    static constexpr int TARGET_STRIDE = STRIDE * SIZE * 2;

    static __device__ __forceinline__ void load_a(uint32 (&out)[4], uint32 stage, int first, int k) {
        const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, chunk = first / 8 + lane / 8 % 2;
        load_matrices_transposed(out, stage + k * SIZE * 2 + row * SIZE * 2 + ((chunk ^ (row & 7)) << 4));
    }
    static __device__ __forceinline__ void load_b(uint32 (&out)[4], uint32 stage, int first, int k) {
        const int lane = threadIdx.x % 32, row = lane % 16, chunk = first / 8 + lane / 16;
        load_matrices_transposed(out, stage + k * SIZE * 2 + row * SIZE * 2 + ((chunk ^ (row & 7)) << 4));
    }
};

// Rows that follow each other.
template <int SIZE> struct TileMajorRows : TileMajor<SIZE> {
    using Layout = TileMajor<SIZE>;
    const X* next;  // this thread's first of the next step
    int pitch;      // bytes
    int left;       // rows of the contraction from there on
    uint32 target = Layout::first_target();

    // the tile's columns start at `first` of `columns`
    __device__ TileMajorRows(const X* matrix, int contraction, int first, int columns) {
        pitch = columns * int(sizeof(X));
        next = advanced(matrix + first + Layout::column(), Layout::row(), pitch);
        left = first + Layout::column() < columns ? contraction - Layout::row() : 0;
    }

    __device__ __forceinline__ void copy(uint32 stage) {
#pragma unroll
        for (int i = 0; i < Layout::COPIES; ++i)
            copy16_async(
                stage + target + i * Layout::TARGET_STRIDE, advanced(next, Layout::STRIDE * i, pitch),
                Layout::STRIDE * i < left
            );
        next = advanced(next, DEPTH, pitch);
        left -= DEPTH;
    }
};

// Rows that an index names. It is read one step ahead of the copies that need it.
template <int SIZE> struct TileMajorGathered : TileMajor<SIZE> {
    using Layout = TileMajor<SIZE>;
    const X* base;     // at this thread's columns
    int pitch;         // bytes
    const int* index;  // at this thread's first row of the step to be looked up
    int left;          // rows of the contraction from there on
    int next[Layout::COPIES];
    uint32 target = Layout::first_target();

    __device__ TileMajorGathered(const X* matrix, const int* row_index, int contraction, int first, int columns) {
        base = matrix + first + Layout::column();
        pitch = columns * int(sizeof(X));
        index = row_index + Layout::row();
        left = first + Layout::column() < columns ? contraction - Layout::row() : 0;
        look_up();
    }

    __device__ __forceinline__ void look_up() {
#pragma unroll
        for (int i = 0; i < Layout::COPIES; ++i) next[i] = Layout::STRIDE * i < left ? index[Layout::STRIDE * i] : 0;
    }

    __device__ __forceinline__ void copy(uint32 stage) {
#pragma unroll
        for (int i = 0; i < Layout::COPIES; ++i)
            copy16_async(
                stage + target + i * Layout::TARGET_STRIDE, advanced(base, next[i], pitch), Layout::STRIDE * i < left
            );
        index += DEPTH;
        left -= DEPTH;
        look_up();
    }
};

// --- the product ---

// What a thread holds of its warp's 64x64: the usual fragments of 4 times 16 rows and 8 times 8 columns.
using Accumulators = float[4][8][4];

__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / WARP_COLUMNS * WARP_TILE; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % WARP_COLUMNS * WARP_TILE; }

template <class A, class B>
__device__ __forceinline__ void multiply_tile(Accumulators& acc, A& a, B& b, int contraction) {
    const uint32 stages = shared_address(dynamic_shared<128>());
    const int steps = (contraction + DEPTH - 1) / DEPTH, row = warp_row(), column = warp_column();
    uint32 fragments_a[2][4][4], fragments_b[2][4][4];
    const auto load = [&](int buffer, uint32 stage, int k) {
#pragma unroll
        for (int m = 0; m < 4; ++m) A::load_a(fragments_a[buffer][m], stage, row + 16 * m, k);
#pragma unroll
        for (int n = 0; n < 4; ++n)
            B::load_b(fragments_b[buffer][n], stage + OPERAND_A_BYTES, column + 16 * n, k);
    };
    const auto multiply = [&](int buffer) {
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const uint32* other = &fragments_b[buffer][n / 2][n % 2 * 2];
                multiply_add<X>(acc[m][n], fragments_a[buffer][m], other[0], other[1]);
            }
    };

#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) {
            a.copy(stages + step * STAGE_BYTES);
            b.copy(stages + step * STAGE_BYTES + OPERAND_A_BYTES);
        }
        commit_copies();
    }
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    uint32 reading = stages, writing = stages + (STAGES - 1) * STAGE_BYTES;
    load(0, reading, 0);
    for (int step = 0; step < steps; ++step) {
        load(1, reading, 16);
        // every warp has left the stage before this one: it is the next to be filled
        if (step + STAGES - 1 < steps) {
            a.copy(writing);
            b.copy(writing + OPERAND_A_BYTES);
        }
        commit_copies();
        multiply(0);
        writing = reading;
        reading = reading == stages + (STAGES - 1) * STAGE_BYTES ? stages : reading + STAGE_BYTES;
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        load(0, reading, 0);  // behind the last step, too, for nobody: a condition would keep it from between products
        multiply(1);
    }
}

// --- epilogues ---

__device__ __forceinline__ int lane_column() { return threadIdx.x % 4 * 8; }
// the i-th of this thread's 8 rows of the tile
__device__ __forceinline__ int row_of(int i) {
    return warp_row() + i / 2 * 16 + i % 2 * 8 + int(threadIdx.x) % 32 / 4;
}

// Calls use(row, left, right, read(row)) for each of this thread's rows: left are its columns from
// warp_column() + lane_column() on, right those 32 further on. It reads one row ahead of the use.
template <class Read, class Use>
__device__ __forceinline__ void for_each_row(const Accumulators& acc, Read read, Use use) {
    auto ahead = read(row_of(0));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const auto now = ahead;
        if (i < 7) ahead = read(row_of(i + 1));
        float values[2][8];
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) values[n / 4][n % 4 * 2 + j] = acc[i / 2][n][i % 2 * 2 + j];
        gather_columns(values[0]);
        gather_columns(values[1]);
        use(row_of(i), values[0], values[1], now);
    }
}
struct Nothing {};
__device__ __forceinline__ Nothing read_nothing(int) { return {}; }

// out points at the tile's first element; so many of its rows and columns exist
template <class Out>
__device__ __forceinline__ void store_tile(
    const Accumulators& acc, int rows, int columns, Out* out, int64 pitch
) {
    const int column = warp_column() + lane_column();
    for_each_row(acc, read_nothing, [&](int row, const float (&left)[8], const float (&right)[8], Nothing) {
        if (row >= rows) return;
        Out* to = out + row * pitch + column;
        if (column < columns) store_values(left, to);
        if (column + 32 < columns) store_values(right, to + 32);
    });
}

// The same, added to what is there.
template <class Out>
__device__ __forceinline__ void add_tile(
    const Accumulators& acc, int rows, int columns, Out* out, int64 pitch
) {
    struct Old {
        float left[8], right[8];
    };
    const int column = warp_column() + lane_column();
    const auto read = [&](int row) {
        Old old = {};
        if (row >= rows) return old;
        const Out* from = out + row * pitch + column;
        if (column < columns) load_values(old.left, from);
        if (column + 32 < columns) load_values(old.right, from + 32);
        return old;
    };
    for_each_row(acc, read, [&](int row, const float (&left)[8], const float (&right)[8], Old sum) {
        if (row >= rows) return;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sum.left[i] += left[i];
            sum.right[i] += right[i];
        }
        Out* to = out + row * pitch + column;
        if (column < columns) store_values(sum.left, to);
        if (column + 32 < columns) store_values(sum.right, to + 32);
    });
}

// --- entry points ---

// The rows of the tile that are read: none of those behind the last group.
__device__ __forceinline__ int rows_read(const Tile& tile, int num_groups) {
    return tile.group == num_groups ? 0 : tile.count;
}

__device__ __forceinline__ ContractionMajor<TILE_ROWS> gathered_rows(
    const X* a, const int* row_index, const Tile& tile, int rows, int depth
) {
    return {
        [&](int i) -> const X* {
            if (i >= rows) return nullptr;
            const int row = tile.first + i;
            return a + int64(row_index != nullptr ? row_index[row] : row) * depth;
        },
        a, depth
    };
}

#if defined(TRANSPOSE_B)

// out[r, n] = sum_k a[row_index[r], k] b[e][n, k]   (TRANSPOSE_B 1)   or   b[e][k, n]   (0)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) grouped_gemm(
    const X* a, const X* b, const int* offsets, const int* row_index, X* out,
    int num_groups, int num_rows, int chunks, int chunk, int depth, int columns, int column_tiles
) {
    after_earlier_kernels();
    const GroupRows groups = {offsets, num_rows, chunks, chunk};
    const Tile tile = find_tile<TILE_ROWS>(blockIdx.x, groups, num_groups, column_tiles);
    if (tile.count == 0) return;
    const int rows = rows_read(tile, num_groups), first_column = tile.column * TILE_COLUMNS;
    const X* weights = b + (rows == 0 ? 0 : int64(tile.group) * depth * columns);
    ContractionMajor<TILE_ROWS> left = gathered_rows(a, row_index, tile, rows, depth);
#if TRANSPOSE_B
    ContractionMajor<TILE_COLUMNS> right(
        [&](int i) -> const X* {
            const int column = first_column + i;
            return column < columns ? weights + int64(column) * depth : nullptr;
        },
        b, depth
    );
#else
    TileMajorRows<TILE_COLUMNS> right(weights, depth, first_column, columns);
#endif
    Accumulators acc = {};
    multiply_tile(acc, left, right, rows == 0 ? 0 : depth);
    store_tile(
        acc, tile.count, columns - first_column, out + int64(tile.first) * columns + first_column, columns
    );
}

#elif defined(WGRAD)

// use(operand): the rows from `begin` on, or those that the index names from there on, unless it is nullptr
template <int SIZE, class Use>
__device__ __forceinline__ void with_rows(
    const X* matrix, const int* index, int begin, int contraction, int first, int columns, Use use
) {
    if (index == nullptr)
        use(TileMajorRows<SIZE>(matrix + int64(begin) * columns, contraction, first, columns));
    else
        use(TileMajorGathered<SIZE>(matrix, index + begin, contraction, first, columns));
}

// out[e][m, n] (+)= scale * sum over the rows r of e of a[a_index[r], m] b[b_index[r], n]
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) grouped_gemm_wgrad(
    const X* a, const X* b, const int* offsets, const int* a_index, const int* b_index,
    type_of<OUT_TYPE>* out, int chunks, int a_columns, int b_columns, int row_tiles, int column_tiles, double scale
) {
    after_earlier_kernels();
    const Place place = place_in_panels(blockIdx.x, row_tiles, column_tiles);
    const int first_row = place.row * TILE_ROWS, first_column = place.column * TILE_COLUMNS;
    const int group = blockIdx.y;
    const int begin = offsets[group * chunks], depth = offsets[(group + 1) * chunks] - begin;
    Accumulators acc = {};
    // Rows that follow each other take fewer instructions than those that an index names: a loop for each case.
    with_rows<TILE_ROWS>(a, a_index, begin, depth, first_row, a_columns, [&](auto left) {
        with_rows<TILE_COLUMNS>(b, b_index, begin, depth, first_column, b_columns, [&](auto right) {
            multiply_tile(acc, left, right, depth);
        });
    });
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][n][i] *= float(scale);
    type_of<OUT_TYPE>* to = out + (int64(group) * a_columns + first_row) * b_columns + first_column;
#if ACCUMULATE
    add_tile(acc, a_columns - first_row, b_columns - first_column, to, b_columns);
#else
    store_tile(acc, a_columns - first_row, b_columns - first_column, to, b_columns);
#endif
}

#elif defined(GLU)

// A warp takes 32 gate columns and the 32 up columns that belong to them.
constexpr int GATE_COLUMNS = TILE_COLUMNS / 2;

// z[r] = w_up[e] x[row_index[r]], a = act(gate) * up
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) grouped_glu(
    const X* x, const X* w_up, const int* offsets, const int* row_index, X* z, X* a,
    int num_groups, int num_rows, int chunks, int chunk, int depth, int intermediate, int column_tiles
) {
    after_earlier_kernels();
    const GroupRows groups = {offsets, num_rows, chunks, chunk};
    const Tile tile = find_tile<TILE_ROWS>(blockIdx.x, groups, num_groups, column_tiles);
    if (tile.count == 0) return;
    const int rows = rows_read(tile, num_groups), first_column = tile.column * GATE_COLUMNS;
    const X* weights = w_up + (rows == 0 ? 0 : int64(tile.group) * 2 * intermediate * depth);
    ContractionMajor<TILE_ROWS> left = gathered_rows(x, row_index, tile, rows, depth);
    ContractionMajor<TILE_COLUMNS> right(
        [&](int i) -> const X* {
            const int column = first_column + i / 64 * 32 + i % 32;
            if (column >= intermediate) return nullptr;
            return weights + int64(column + i / 32 % 2 * intermediate) * depth;
        },
        w_up, depth
    );
    Accumulators acc = {};
    multiply_tile(acc, left, right, rows == 0 ? 0 : depth);
    const int column = first_column + warp_column() / 2 + lane_column();
    for_each_row(acc, read_nothing, [&](int row, const float (&gate)[8], const float (&up)[8], Nothing) {
        if (row >= tile.count || column >= intermediate) return;
        const int64 at = int64(tile.first) + row;
        store_glu(
            Whole(), ACTIVATION, gate, up, z != nullptr ? z + at * 2 * intermediate + column : nullptr,
            a + at * intermediate + column, intermediate
        );
    });
}

#elif defined(GLU_BACKWARD)

// What a thread reads for a row of its epilogue; zeros for a row that is nobody's.
struct RowOfZ {
    Vector<X, 8> gate[2], up[2];
    float weight;
};

// The tile's part of z, while the product is under way.
__device__ __forceinline__ void prefetch_z(
    const X* z, const Tile& tile, int rows, int first_column, int intermediate
) {
    constexpr int LINE = 64;  // elements
    for (int i = threadIdx.x; i < rows * (TILE_COLUMNS / LINE); i += THREADS) {
        const int column = first_column + i % (TILE_COLUMNS / LINE) * LINE;
        if (column >= intermediate) continue;
        const X* from = z + (int64(tile.first) + i / (TILE_COLUMNS / LINE)) * 2 * intermediate + column;
        prefetch(from);
        prefetch(from + intermediate);
    }
}

// da'[r] = w_down[e]^T dout[row_index[r]]; from it dz, p*a, and for each 64 columns their part of dp
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) grouped_glu_backward(
    const X* dout, const X* w_down, const int* offsets, const int* row_index, const float* row_weights,
    const X* z, X* dz, X* pa, float* dp_parts,
    int num_groups, int num_rows, int chunks, int chunk, int depth, int intermediate, int column_tiles
) {
    after_earlier_kernels();
    const GroupRows groups = {offsets, num_rows, chunks, chunk};
    const Tile tile = find_tile<TILE_ROWS>(blockIdx.x, groups, num_groups, column_tiles);
    if (tile.count == 0) return;
    const int rows = rows_read(tile, num_groups), first_column = tile.column * TILE_COLUMNS;
    const X* weights = w_down + (rows == 0 ? 0 : int64(tile.group) * depth * intermediate);
    ContractionMajor<TILE_ROWS> left = gathered_rows(dout, row_index, tile, rows, depth);
    TileMajorRows<TILE_COLUMNS> right(weights, depth, first_column, intermediate);
    prefetch_z(z, tile, rows, first_column, intermediate);
    Accumulators acc = {};
    multiply_tile(acc, left, right, rows == 0 ? 0 : depth);
    const int first = first_column + warp_column(), column = first + lane_column();
    if (first >= intermediate) return;
    float* parts = dp_parts + int64(first / WARP_TILE) * num_rows;
    const auto read = [&](int row) {
        RowOfZ out = {};
        if (row >= rows) return out;
        const int64 at = int64(tile.first) + row;
        const X* from = z + at * 2 * intermediate + column;
        out.weight = row_weights[at];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            if (column + 32 * side >= intermediate) continue;
            out.gate[side] = load_vector<X, 8>(from + 32 * side);
            out.up[side] = load_vector<X, 8>(from + 32 * side + intermediate);
        }
        return out;
    };
    const auto use = [&](int row, const float (&left_da)[8], const float (&right_da)[8], const RowOfZ& now) {
        const int64 at = int64(tile.first) + row;
        float dot = 0;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int side_column = column + 32 * side;
            if (row >= tile.count || side_column >= intermediate) continue;
            float gate[8], up[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                gate[i] = widen(now.gate[side].at[i]);
                up[i] = widen(now.up[side].at[i]);
            }
            dot += store_glu_gradient(
                Whole(), ACTIVATION, side == 0 ? left_da : right_da, now.weight, gate, up,
                dz + at * 2 * intermediate + side_column, pa + at * intermediate + side_column, intermediate
            );
        }
        dot += __shfl_xor_sync(0xffffffffu, dot, 1);
        dot += __shfl_xor_sync(0xffffffffu, dot, 2);
        if (row < tile.count && threadIdx.x % 4 == 0) parts[at] = dot;
    };
    for_each_row(acc, read, use);
}

#endif
