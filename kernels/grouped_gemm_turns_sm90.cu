// Grouped products of 16-bit matrices on Hopper's tensor cores (sm_90a), for contractions so short that the end of a
// tile counts: two warpgroups take turns. While one multiplies, the other finishes its tile.
//
// A block's tile is 128 rows by 192 columns. The two blocks of a cluster take tiles that have the columns in common:
// each fetches half of that operand and sends it to both. A block stays and takes one tile after the other. One thread
// keeps a ring of stages filled, 64 deep each; of the two warpgroups that multiply, each has every other tile for
// itself. All widths must divide by 8 and all arrays be 16-byte aligned.
//
// Defines: X_TYPE (code of types.cuh), TRANSPOSE_B=0|1.

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#error "grouped_gemm_turns_sm90.cu is for sm_90a"
#endif

#include "common/boxes.cuh"
#include "common/clear.cuh"
#include "common/cluster.cuh"
#include "common/cluster_walk.cuh"
#include "common/dynamic_shared.cuh"
#include "common/launch_order.cuh"
#include "common/mbarrier.cuh"
#include "common/pace.cuh"
#include "common/pieces.cuh"
#include "common/ring.cuh"
#include "common/roles.cuh"
#include "common/tile_queue.cuh"
#include "common/tma.cuh"
#include "common/types.cuh"
#include "common/warp.cuh"
#include "common/warpgroup.cuh"
#include "common/wgmma.cuh"

using X = type_of<X_TYPE>;

constexpr int ROWS = 128, COLUMNS = 192;
constexpr int DEPTH = 64;  // of a stage along the contraction
constexpr int CONSUMERS = 2;  // warpgroups that multiply
constexpr int BLOCKS = ROWS / 64;  // of a tile, of 64 rows each
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int ROWS_BYTES = ROWS * DEPTH * 2, COLUMNS_BYTES = COLUMNS * DEPTH * 2;
constexpr int STAGE_BYTES = ROWS_BYTES + COLUMNS_BYTES;
constexpr int STAGES = 4;
constexpr int ASKING = 4;  // so many steps before a tile's end its block asks for the next one
// Of the 64K registers, what a fetching thread leaves to a multiplying one.
constexpr int FETCH_REGISTERS = 40, MULTIPLY_REGISTERS = 232;

// --- shared memory ---

constexpr int BUFFERS = 3;  // of each warp that multiplies, a piece of its tile in each
constexpr int WARP_BYTES = BUFFERS * PIECE_BYTES;

struct Shared {
    RingBarriers<STAGES> barriers;
    TileQueue queue;
    TileList tiles;
};
constexpr int SHARED_AT = STAGES * STAGE_BYTES + CONSUMERS * WARPGROUP / 32 * WARP_BYTES;

__device__ __forceinline__ Shared& shared() {
    return *reinterpret_cast<Shared*>(dynamic_shared<ATOM_BYTES>() + SHARED_AT);
}

using Ring = RingOf<STAGES, ROWS_BYTES, COLUMNS_BYTES, SHARED_AT>;
using Walk = ClusterWalk<ROWS>;

// A warp's buffers, one after the other, from one tile to the next.
struct Buffers {
    uint32 at = shared_address(dynamic_shared<ATOM_BYTES>()) + STAGES * STAGE_BYTES +
                (warp() - WARPGROUP / 32) * WARP_BYTES;
    int used = BUFFERS - 1;  // the last one

    __device__ __forceinline__ uint32 next() {
        wait_for_reads<BUFFERS - 1>();
        __syncwarp();
        used = used == BUFFERS - 1 ? 0 : used + 1;
        return at + used * PIECE_BYTES;
    }
};

// --- turns ---
// A warpgroup begins to wait for its tile's stages when all products of the other's are issued. So they do not compete
// for the tensor cores; and as each leaves the other's stages out, a wait that began earlier might be for a phase that
// lies two ahead, which its parity can't tell from one that is over.

__device__ __forceinline__ void wait_for_turn() { meet_at(1 + consumer(), CONSUMERS * WARPGROUP); }
__device__ __forceinline__ void give_turn() { pass_by(1 + (consumer() ^ 1), CONSUMERS * WARPGROUP); }

// --- multiplying ---

// The same for tiles with few rows, of which the last block is left alone: two kinds would be more than there are
// registers for.
using Sums = float[BLOCKS][COLUMNS / 8][4];

// sums = a b, of the first COUNT blocks, over `steps` stages, at least one. Returns the last one: its products may
// still be under way, and it is not released.
template <int COUNT>
__device__ __forceinline__ Ring multiply_tile(Sums& sums, Ring& ring, int steps) {
    Ring before;
    for (int step = 0; step < steps; ++step, ring.advance()) {
        wait(ring.full(), ring.parity);
        begin_products();
        const uint64 b = operand_at(ring.common());
#pragma unroll
        for (int m = 0; m < COUNT; ++m) {
            const uint64 a = operand_at(ring.own() + 64 * m * DEPTH * 2);
#pragma unroll
            for (int k = 0; k < DEPTH / 16; ++k)
                Multiply<X, false, !TRANSPOSE_B, COLUMNS>::run(
                    sums[m], a + k * SLICE<false>, b + k * SLICE<!TRANSPOSE_B>, step + k > 0
                );
        }
        commit_products();
        wait_for_products<1>();
        if (step > 0) release(before.empty());
        before = ring;
    }
    return before;
}

// out[r, n] = sum_k a[r, k] b[e][n, k]   (TRANSPOSE_B 1)   or   b[e][k, n]   (0)
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) grouped_gemm(
    const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
    const __grid_constant__ TensorMap out_map, const int* offsets, X* out,
    int num_groups, int num_rows, int chunks, int chunk, int depth, int columns, int column_tiles,
    uint32* due, int* drawn
) {
    wait_for_earlier_kernels();
    if (threadIdx.x == 0) shared().queue.init();
    if (threadIdx.x < 32)
        shared().tiles.fill({offsets, num_rows, chunks, chunk}, num_groups, Walk::ROWS, column_tiles);
    const int steps = (depth + DEPTH - 1) / DEPTH, stride = tile_stride();
    const auto fetch_all = [&] {
        if (threadIdx.x > 0) return;
        const auto copy_part = [&](const Ring& ring, const Tile& tile, int k) {
            const int first = tile.column * COLUMNS, rank = cluster_rank();
            if constexpr (TRANSPOSE_B) {
                constexpr int PART = COLUMNS / CLUSTER;
                copy_to_all<PART, false>(
                    ring.common_part(), b_map, first + rank * PART, k, tile.group, ring.full()
                );
            } else {
                constexpr int PART = DEPTH / CLUSTER;  // half of the columns are no whole number of boxes
                copy_to_all<COLUMNS, true>(
                    ring.common() + rank * PART * SWIZZLE_BYTES, b_map, first, k + rank * PART, tile.group,
                    ring.full()
                );
            }
        };
        Walk walk(shared().tiles, num_groups, column_tiles);
        const int products = walk.products();
        // the other block of a cluster can't get far ahead of the one that waits
        Pace pace{cluster_rank() == 0 ? due : nullptr};
        TileDrawer drawer{drawn};
        Ring ring;
        Tile tile;
        pace.announce();
        drawer.hand_out(shared().queue, 0);
        int index = shared().queue.read(0), n = 1;
        const auto proceed = [&] {
            drawer.hand_out(shared().queue, n);
            index = shared().queue.read(n++);
        };
        for (; index < products; proceed()) {
            walk.find(index, tile);
            pace.wait(index, stride, products);
            for (int step = 0; step < steps; ++step, ring.advance()) {
                const int k = step * DEPTH;
                if (step == steps - 1) pace.announce();
                if (step == max(0, steps - ASKING)) drawer.ask();
                wait(ring.empty(), ring.parity ^ 1);
                arrive_expecting(ring.full(), STAGE_BYTES);
                copy_part(ring, tile, k);
                copy_own<ROWS, false>(ring.own(), a_map, tile.first, k, 0, ring.full());
            }
        }
        let_later_kernels_come();
        // each of the two that multiply wants to see the end
        drawer.ask();
        proceed();
    };
    const auto multiply_all = [&] {
        Walk walk(shared().tiles, num_groups, column_tiles);
        const int products = walk.products();
        Ring ring;
        Buffers buffers;
        Tile tile;
        ring.skip(consumer() * steps);
        const auto tile_of_block = [&](int n) { return same_in_warp(shared().queue.read(n)); };
        const auto place = [&]() -> TileOut<X> {
            const int first = tile.column * COLUMNS;
            return {
                out + int64(tile.first) * columns + first, columns, out_map, first, tile.first, 0, tile.count,
                columns - first
            };
        };
        for (int n = consumer();; n += CONSUMERS) {
            const int index = tile_of_block(n);
            if (index >= products) break;
            walk.find(index, tile);
            const TileOut<X> to = place();
            // The other's tile is known as soon as this one is fetched.
            const auto give = [&] {
                if (tile_of_block(n + 1) < products) give_turn();
            };
            if (n > 0) wait_for_turn();
            if (tile.count == 0) {
                pass_stages(ring, steps);
                give();
            } else {
                Sums sums;
                const Ring last =
                    tile.count > 64 ? multiply_tile<2>(sums, ring, steps) : multiply_tile<1>(sums, ring, steps);
                give();
                wait_for_products<0>();
#pragma unroll
                for (int m = 0; m < BLOCKS; ++m) keep_in_order<COLUMNS>(sums[m]);
                release(last.empty());
#pragma unroll
                for (int m = 0; m < BLOCKS; ++m)
                    store_rows<false>(buffers, to, 64 * m + warp() % 4 * 16, sums[m]);
            }
            ring.skip(steps);  // the other warpgroup's
        }
        for (int index = products + first_tile() + consumer() * stride; walk.find(index, tile);
             index += CONSUMERS * stride) {
            const TileOut<X> to = place();
            clear<ROWS, COLUMNS>(to.at, 0, to.rows, to.columns, to.pitch);
        }
        wait_for_reads<0>();
    };
    share_work<Ring, FETCH_REGISTERS, MULTIPLY_REGISTERS>(1, CLUSTER * WARPGROUP / 32, fetch_all, multiply_all);
}
