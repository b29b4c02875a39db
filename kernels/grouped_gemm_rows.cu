// Grouped products of few rows, such as tokens that are decoded, at the rate of reading the weights (mma.sync, sm_80 and
// newer): grouped_gemm by weights [N, K], and grouped_glu.
//
// The weights pass through registers, and nothing waits for shared memory. A warp takes 16 rows of the weights, which
// are columns of the result, and a quarter of the contraction, against up to 8 rows of a group; the four warps' sums are
// added in order. A lane reads 16 bytes of a row and gives them to two products: which of the contraction's elements meet
// in which product does not matter, as long as it is the same on both sides. Where rows of the result belong to no group
// they are zeros. All widths must divide by 8 and all arrays be 16-byte aligned.
//
// Defines: X_TYPE (code of types.cuh, 16 bits); for grouped_glu GLU and ACTIVATION.

#include "common/activation.cuh"
#include "common/launch_order.cuh"
#include "common/mma.cuh"
#include "common/types.cuh"
#include "common/warp.cuh"

using X = type_of<X_TYPE>;

// The same as in ffmoe_core/cuda/grouped_gemm.pyx.
constexpr int SPLITS = 4, TILES = 2;  // parts of the contraction, and tiles of columns, of a block
constexpr int THREADS = 32 * SPLITS * TILES;
constexpr int ROWS = 8;   // of a tile
constexpr int DEPTH = 32;  // of a step: 8 for each of four lanes
constexpr int STEPS_AHEAD = 4;

using Piece = Vector<uint32, 4>;  // 8 elements

// The rows of a block's tile; none where an earlier block has them, or before the first group's.
struct Rows {
    int first, count;
    bool of_group;
    int group;
};

__device__ __forceinline__ Rows rows_of_block(const int* offsets, int num_groups, int num_rows) {
    const int row = blockIdx.y;
    int before = 0;  // groups that end before it
    for (int g = lane(); g < num_groups; g += 32) before += offsets[g + 1] <= row;
    const int group = warp_sum(before);
    const bool of_group = group < num_groups;
    const int begin = offsets[group], end = of_group ? min(offsets[group + 1], num_rows) : num_rows;
    const bool begins = row >= begin && (row - begin) % ROWS == 0;
    return {row, begins ? min(end - row, ROWS) : 0, of_group, group};
}

__device__ __forceinline__ Piece weights_or_zeros(const X* from, bool there) {
    Piece piece = {};
    if (there) load_piece(from, piece.at[0], piece.at[1], piece.at[2], piece.at[3]);
    return piece;
}
__device__ __forceinline__ Piece piece_or_zeros(const X* from, bool there) {
    Piece piece = {};
    if (there) piece = load_vector<uint32, 4>(reinterpret_cast<const uint32*>(from));
    return piece;
}

// This warp's part of the sums of 16 columns, the rows `low` and, 8 of them, `high` of the weights, by the tile's rows: the
// lane's row of the weights is `lane / 4`, and so is its row of a.
__device__ __forceinline__ void multiply(
    float (&sums)[4], const X* low, const X* high, const X* a, int depth, int split
) {
    const int part = (depth + DEPTH * SPLITS - 1) / (DEPTH * SPLITS) * DEPTH;
    const int begin = split * part, end = min(begin + part, depth);
    for (int first = begin; first < end; first += DEPTH * STEPS_AHEAD) {
        Piece of_low[STEPS_AHEAD], of_high[STEPS_AHEAD], of_a[STEPS_AHEAD];
#pragma unroll
        for (int i = 0; i < STEPS_AHEAD; ++i) {
            const int k = first + DEPTH * i + lane() % 4 * 8;
            of_low[i] = weights_or_zeros(low + k, low != nullptr && k < end);
            of_high[i] = weights_or_zeros(high + k, high != nullptr && k < end);
            of_a[i] = piece_or_zeros(a + k, a != nullptr && k < end);
        }
#pragma unroll
        for (int i = 0; i < STEPS_AHEAD; ++i)
#pragma unroll
            for (int half = 0; half < 4; half += 2) {
                const uint32 weights[4] = {
                    of_low[i].at[half], of_high[i].at[half], of_low[i].at[half + 1], of_high[i].at[half + 1]
                };
                multiply_add<X>(sums, weights, of_a[i].at[half], of_a[i].at[half + 1]);
            }
    }
}

// All of the contraction's sums, in the warps of its first part.
__device__ __forceinline__ void add_up(float (&sums)[4], int tile, int split) {
    __shared__ __align__(16) float parts[TILES][SPLITS - 1][32][4];
    if (split > 0) store_vector(parts[tile][split - 1][lane()], Vector<float, 4>{sums[0], sums[1], sums[2], sums[3]});
    __syncthreads();
    if (split > 0) return;
#pragma unroll
    for (int s = 0; s < SPLITS - 1; ++s) {
        const Vector<float, 4> part = load_vector<float, 4>(parts[tile][s][lane()]);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += part.at[i];
    }
}

// The lane's row of the tile, in a matrix whose rows are `width` wide.
__device__ __forceinline__ const X* row_of_lane(const Rows& rows, const X* matrix, const int* index, int width) {
    const int i = lane() / 4, row = rows.first + i;
    if (!rows.of_group || i >= rows.count) return nullptr;
    return matrix + int64(index != nullptr ? index[row] : row) * width;
}

#if !defined(GLU)

// out[r] = a[row_index[r]] b[g]^T for the rows r of group g, with b[g] as [columns, depth].
extern "C" __global__ void __launch_bounds__(THREADS) grouped_gemm(
    const X* a, const X* b, const int* offsets, const int* row_index, X* out, int num_groups, int num_rows, int depth,
    int columns
) {
    after_earlier_kernels();
    const Rows rows = rows_of_block(offsets, num_groups, num_rows);
    if (rows.count <= 0) return;
    const int tile = warp() / SPLITS, split = warp() % SPLITS;
    const int column = (blockIdx.x * TILES + tile) * 16 + lane() / 4;
    const X* weights = b + (int64(rows.group) * columns + column) * depth;
    float sums[4] = {};
    if (rows.of_group)
        multiply(
            sums, column < columns ? weights : nullptr, column + 8 < columns ? weights + int64(8) * depth : nullptr,
            row_of_lane(rows, a, row_index, depth), depth, split
        );
    add_up(sums, tile, split);
    if (split > 0) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = lane() % 4 * 2 + i % 2, at = column + i / 2 * 8;
        if (row < rows.count && at < columns) narrow(sums[i], out[int64(rows.first + row) * columns + at]);
    }
}

#else

// z[r] = x[row_index[r]] w_up[g]^T for the rows r of group g, gate rows first; a[r] = act(gate) * up. z may be NULL.
extern "C" __global__ void __launch_bounds__(THREADS) grouped_glu(
    const X* x, const X* w_up, const int* offsets, const int* row_index, X* z, X* a, int num_groups, int num_rows,
    int depth, int intermediate
) {
    after_earlier_kernels();
    const Rows rows = rows_of_block(offsets, num_groups, num_rows);
    if (rows.count <= 0) return;
    const int tile = warp() / SPLITS, split = warp() % SPLITS;
    const int column = (blockIdx.x * TILES + tile) * 8 + lane() / 4;
    const X* gate = w_up + (int64(rows.group) * 2 * intermediate + column) * depth;
    const bool there = column < intermediate;
    float sums[4] = {};  // of the gate for two rows, and of up
    if (rows.of_group)
        multiply(
            sums, there ? gate : nullptr, there ? gate + int64(intermediate) * depth : nullptr,
            row_of_lane(rows, x, row_index, depth), depth, split
        );
    add_up(sums, tile, split);
    if (split > 0 || !there) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = lane() % 4 * 2 + i;
        if (row >= rows.count) continue;
        const int64 at = rows.first + row;
        if (z != nullptr) {
            narrow(sums[i], z[at * 2 * intermediate + column]);
            narrow(sums[i + 2], z[at * 2 * intermediate + intermediate + column]);
        }
        narrow(activate<true>(ACTIVATION, sums[i]).value * sums[i + 2], a[at * intermediate + column]);
    }
}

#endif
