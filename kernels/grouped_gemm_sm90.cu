// Grouped products of 16-bit matrices on Hopper's tensor cores (sm_90a: wgmma, TMA, clusters).
//
// A block's tile is 128 rows by 256 columns, or with SHARE_A 256 by 128. The two blocks of a cluster take
// tiles that have the 256 in common: that operand ("shared") is fetched once, half by each block, and sent to
// both. Without that the second-level cache could not keep up. The other operand is the block's own.
//
// A block stays and takes one tile after the other. Its first warpgroup keeps a ring of stages filled, 64
// deep each, with the copy engine's boxes and with rows gathered by cp.async. The other two warpgroups
// multiply, every other 64 rows each, and finish the sums in registers. All widths must divide by 8 and all
// arrays be 16-byte aligned.
//
// Defines: X_TYPE (code of types.cuh), SHARE_A=0|1, GATHER (the block's own operand has rows that an index
// names), and one of
//   TRANSPOSE_B=0|1                  grouped_gemm
//   WGRAD, OUT_TYPE, ACCUMULATE=0|1  grouped_gemm_wgrad
//   GLU, ACTIVATION                  grouped_glu
//   GLU_BACKWARD, ACTIVATION         grouped_glu_backward

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#error "grouped_gemm_sm90.cu is for sm_90a"
#endif

#include "common/boxes.cuh"
#include "common/clear.cuh"
#include "common/cluster.cuh"
#include "common/cluster_walk.cuh"
#include "common/cp_async.cuh"
#include "common/dynamic_shared.cuh"
#include "common/epilogue.cuh"
#include "common/launch_order.cuh"
#include "common/longest_first.cuh"
#include "common/mbarrier.cuh"
#include "common/mma.cuh"
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

constexpr int OWN = 128, SHARED = 256;  // rows or columns of a block's operands
constexpr int PART = SHARED / CLUSTER;  // what a block fetches of the shared operand
constexpr int TILE_ROWS = SHARE_A ? SHARED : OWN, TILE_COLUMNS = SHARE_A ? OWN : SHARED;
constexpr int CONSUMERS = 2;            // warpgroups that multiply
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int BLOCKS = TILE_ROWS / 64 / CONSUMERS;  // of 64 rows, for a warpgroup
constexpr int DEPTH = 64;               // of a stage along the contraction
constexpr int OWN_BYTES = OWN * DEPTH * 2, SHARED_BYTES = SHARED * DEPTH * 2;
constexpr int STAGE_BYTES = OWN_BYTES + SHARED_BYTES;
constexpr int STAGES = 4;
// Of the 64K registers, what a fetching thread leaves to a multiplying one.
constexpr int FETCH_REGISTERS = 80, MULTIPLY_REGISTERS = 208;

// --- shared memory ---

// Finished sums leave 64 columns of 64 rows at a time through buffers: a tile's last stage, which is held back for
// that, and a spare one for each warpgroup that multiplies.
constexpr int BUFFER_BYTES = 4 * PIECE_BYTES;
constexpr int BUFFERS_OF_STAGE = STAGE_BYTES / CONSUMERS / BUFFER_BYTES, BUFFERS = BUFFERS_OF_STAGE + 1;

struct Shared {
    RingBarriers<STAGES> barriers;
    int rows[STAGES][DEPTH];  // of a matrix whose gathered rows are the contraction
    TileQueue queue;
#if defined(WGRAD)
    int tile[STAGES];  // that a stage is of
    LongestFirst groups;
#else
    TileList tiles;
#endif
};
constexpr int SHARED_AT = STAGES * STAGE_BYTES + CONSUMERS * BUFFER_BYTES;

__device__ __forceinline__ Shared& shared() {
    return *reinterpret_cast<Shared*>(dynamic_shared<ATOM_BYTES>() + SHARED_AT);
}

using Ring = RingOf<STAGES, OWN_BYTES, SHARED_BYTES, SHARED_AT>;

// --- fetching, by the threads of the first warpgroup ---

// OWN rows of a matrix that an index names, the contraction contiguous.
struct GatheredRows {
    static constexpr int STRIDE = WARPGROUP / 8, COPIES = OWN / STRIDE;
    const X* rows[COPIES];  // at this thread's 16 bytes of the next step
    int left;               // contraction from there on
    int there;              // how many of these rows exist

    // Rows from `count` on become zeros: where an expert has few, fetching some row in their place would cost more
    // than the weights.
    __device__ __forceinline__ void start(const X* matrix, const int* index, int count, int depth) {
        const int chunk = threadIdx.x % 8;
        left = depth - chunk * 8;
        there = (count - int(threadIdx.x) / 8 + STRIDE - 1) / STRIDE;
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int at = threadIdx.x / 8 + STRIDE * i;
            rows[i] = matrix + int64(at < count ? index[at] : 0) * depth + chunk * 8;
        }
    }
    __device__ __forceinline__ void copy(uint32 to) {
        const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
        to += row * SWIZZLE_BYTES + ((chunk ^ row % 8) << 4);
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            copy16_async(to + i * STRIDE * SWIZZLE_BYTES, rows[i], left > 0 && i < there);
            rows[i] += DEPTH;
        }
        left -= DEPTH;
    }
};

// OWN columns of a matrix of which an index names the rows that are the contraction; those that are missing
// become zeros. A warp copies 16 rows of a stage. Their numbers have come to shared memory before: they are needed to
// issue the copies, and waiting for them there would leave the stages empty.
struct GatheredColumns {
    static constexpr int CHUNKS = OWN / 8, STRIDE = 32 / CHUNKS;
    static constexpr int ROWS = DEPTH / (WARPGROUP / 32), COPIES = ROWS / STRIDE;
    const X* base;  // at this thread's columns
    int pitch;      // bytes
    int row;        // of the next step, the warp's first
    int count;      // of rows; 0 where the columns do not exist

    __device__ __forceinline__ void start(const X* matrix, int columns, int first_column, int rows) {
        const int column = first_column + lane() % CHUNKS * 8;
        base = matrix + min(column, columns - 8);
        pitch = columns * int(sizeof(X));
        row = warp() * ROWS;
        count = column < columns ? rows : 0;
    }
    // The numbers of a step's rows: of `rows` that an index names those from `first` on.
    static __device__ __forceinline__ void look_up(int stage, const int* index, int first, int rows) {
        const int of_step = warp() * ROWS + lane(), at = first + of_step;
        if (lane() < ROWS)
            copy4_async(shared_address(&shared().rows[stage][of_step]), index + min(at, rows - 1), at < rows);
    }
    // For each step the threads have looked its rows up, and committed that, STAGES steps before.
    __device__ __forceinline__ void copy(const Ring& ring) {
        const int chunk = lane() % CHUNKS, part = lane() / CHUNKS, first = warp() * ROWS + part;
        const uint32 to = ring.own() + chunk / 8 * TILE_MAJOR_STRIDE;
        int from[COPIES];
        wait_for_copies<STAGES - 1>();
        __syncwarp();
#pragma unroll
        for (int i = 0; i < COPIES; ++i) from[i] = shared().rows[ring.stage][first + STRIDE * i];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int at = first + STRIDE * i;
            copy16_async(
                to + at * SWIZZLE_BYTES + ((chunk % 8 ^ at % 8) << 4), advanced(base, from[i], pitch),
                row + part + STRIDE * i < count
            );
        }
        row += DEPTH;
    }
};

// SIZE columns of the last rows of a contraction, fewer than DEPTH of them; the missing ones become zeros.
template <int SIZE>
__device__ __forceinline__ void copy_last_rows(
    uint32 to, const X* matrix, int columns, int first_column, int rows
) {
    constexpr int CHUNKS = SIZE / 8, STRIDE = WARPGROUP / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, column = first_column + chunk * 8;
    to += chunk / 8 * TILE_MAJOR_STRIDE;
#pragma unroll 4
    for (int at = threadIdx.x / CHUNKS; at < DEPTH; at += STRIDE) {
        const bool there = at < rows && column < columns;
        copy16_async(
            to + at * SWIZZLE_BYTES + ((chunk % 8 ^ at % 8) << 4),
            matrix + (there ? int64(at) * columns + column : 0), there
        );
    }
}

// --- multiplying ---

using Sums = float[BLOCKS][TILE_COLUMNS / 8][4];

// The tile's row where this warpgroup's block m starts.
__device__ __forceinline__ int block_row(int m) { return 64 * (consumer() + CONSUMERS * m); }

// Releases the stage of this barrier, if any, when the stores of this warp have read what they take from there.
__device__ __forceinline__ void let_go(uint32& held) {
    if (held == 0) return;
    wait_for_reads<0>();
    __syncwarp();
    release(held);
    held = 0;
}

// sums = a b over `steps` stages, at least one. Returns the last one, which is not released. held: see let_go.
template <bool TILE_MAJOR_A, bool TILE_MAJOR_B>
__device__ __forceinline__ Ring multiply_tile(Sums& sums, Ring& ring, int steps, uint32& held) {
    Ring before;
    for (int step = 0; step < steps; ++step, ring.advance()) {
        wait(ring.full(), ring.parity);
        if (GATHER || TILE_MAJOR_A) publish_shared();  // cp.async may have written
        begin_products();
        const uint64 b = operand_at(SHARE_A ? ring.own() : ring.common());
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m) {
            const uint64 a = operand_at((SHARE_A ? ring.common() : ring.own()) + block_row(m) * DEPTH * 2);
#pragma unroll
            for (int k = 0; k < DEPTH / 16; ++k)
                Multiply<X, TILE_MAJOR_A, TILE_MAJOR_B, TILE_COLUMNS>::run(
                    sums[m], a + k * SLICE<TILE_MAJOR_A>, b + k * SLICE<TILE_MAJOR_B>, step + k > 0
                );
        }
        commit_products();
        wait_for_products<1>();
        if (step > 0)
            release(before.empty());
        else
            let_go(held);
        before = ring;
    }
    wait_for_products<0>();
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m) keep_in_order<TILE_COLUMNS>(sums[m]);
    return before;
}

// Leaves a tile, none of whose rows are this warpgroup's, to the others.
__device__ __forceinline__ void pass_tile(Ring& ring, int steps, uint32& held) {
    let_go(held);
    pass_stages(ring, steps);
}

// Before a tile's last stage is written to: all who multiply it have read its operands.
__device__ __forceinline__ void meet_multipliers(int rows) {
    if (rows > 64) meet_at(1, CONSUMERS * WARPGROUP);
}

// --- finishing ---
// A thread's sums[m][n][2 half + i] are of row tile_row(m, half) and column 8 n + 2 (lane % 4) + i of the
// tile.

__device__ __forceinline__ int tile_row(int m, int half) {
    return block_row(m) + warp() % 4 * 16 + 8 * half + lane() / 4;
}
// The tile's row where this warp's 16 of block m start.
__device__ __forceinline__ int warp_row(int m) { return block_row(m) + warp() % 4 * 16; }

// The buffers of a tile whose last stage is held back, one after the other.
struct Buffers {
    const Ring& stage;
    int used = 0;

    __device__ __forceinline__ uint32 next() {
        if (used >= BUFFERS) {
            wait_for_reads<BUFFERS - 1>();
            __syncwarp();
        }
        const int i = used++ % BUFFERS;
        const uint32 at = i < BUFFERS_OF_STAGE
            ? stage.own() + (consumer() * BUFFERS_OF_STAGE + i) * BUFFER_BYTES
            : shared_address(dynamic_shared<ATOM_BYTES>()) + STAGES * STAGE_BYTES + consumer() * BUFFER_BYTES;
        return at + warp() % 4 * PIECE_BYTES;
    }
};

// All of a tile's sums.
template <bool CLIPPED>
__device__ __forceinline__ void store_tile(const Sums& sums, const Ring& stage, const TileOut<X>& to) {
    Buffers buffers{stage};
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m) store_rows<CLIPPED>(buffers, to, warp_row(m), sums[m]);
}

// out (+)= sums, where out is float32 or added to. It points at the tile's first element; so many of its rows and
// columns exist.
template <bool ADD, class Out>
__device__ __forceinline__ void update_tile(const Sums& sums, int rows, int columns, Out* out, int64 pitch) {
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile_row(m, half);
            Out* to = out + row * pitch;
#pragma unroll
            for (int n = 0; n < TILE_COLUMNS / 8; ++n) {
                const int column = 8 * n + lane() % 4 * 2;
                if (row >= rows || column >= columns) continue;
                const Vector<Out, 2> old = ADD ? load_vector<Out, 2>(to + column) : Vector<Out, 2>{};
                Vector<Out, 2> pair;
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    narrow(sums[m][n][2 * half + i] + (ADD ? widen(old.at[i]) : 0.0f), pair.at[i]);
                store_vector(to + column, pair);
            }
        }
}

__device__ __forceinline__ void scale_all(Sums& sums, float scale) {
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int n = 0; n < TILE_COLUMNS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] *= scale;
}

// Zeros in this warpgroup's part of a tile that has no product.
template <class Out>
__device__ __forceinline__ void clear_tile(Out* out, int rows, int columns, int64 pitch) {
    for (int m = 0; m < BLOCKS; ++m)
        clear<64, TILE_COLUMNS>(out, block_row(m), rows, columns, pitch);
}

// --- roles ---

// The block's threads part. So many arrivals tell that a stage has come.
template <class Fetch, class Multiply>
__device__ __forceinline__ void part(int arrivals, Fetch fetch_all, Multiply multiply_all) {
    share_work<Ring, FETCH_REGISTERS, MULTIPLY_REGISTERS>(
        arrivals, CLUSTER * CONSUMERS * WARPGROUP / 32, fetch_all, multiply_all
    );
}

// What a stage waits for besides bytes.
constexpr int COPY_ARRIVALS = 1, GATHER_ARRIVALS = COPY_ARRIVALS + WARPGROUP;

#if !defined(WGRAD)

// --- products of grouped rows ---

// So many steps before a tile's end its block announces the next one (pace.cuh). Where rows are gathered, a tile
// starts slowly, and blocks must not wait for each other as well.
constexpr int EARLY = GATHER ? 10 : 1;
constexpr int ASKING = 4;  // likewise it asks for the next tile

struct Rows {
    const X* a;            // read if GATHER
    const TensorMap& map;  // of a, if not
    GroupRows groups;
    const int* row_index;
    int num_groups, depth, column_tiles;
    uint32* due;  // see Pace
    int* drawn;   // see TileDrawer
    int steps = (depth + DEPTH - 1) / DEPTH;
};

using Walk = ClusterWalk<OWN>;

// For every tile of a group: its product, then held = finish(sums, tile, ring, last) with its last stage, which finish
// releases or returns for let_go. For a step, copy_part(to, tile, k, full) is called in one thread for this block's part
// of the second operand. After a tile's product MORE_STEPS stages are what copy_more(ring, tile, i) puts there, in one
// thread, for finish. Then clear(tile) for rows that are nobody's.
template <bool TILE_MAJOR_B, int MORE_STEPS, class CopyPart, class CopyMore, class Finish, class Clear>
__device__ __forceinline__ void multiply_rows(
    const Rows& rows, CopyPart copy_part, CopyMore copy_more, Finish finish, Clear clear
) {
    if (threadIdx.x == 0) shared().queue.init();
    if (threadIdx.x < 32)
        shared().tiles.fill(rows.groups, rows.num_groups, Walk::ROWS, rows.column_tiles);
    const auto fetch_all = [&] {
        // With nothing to gather one thread is enough; and one that waits for stages, but that nobody waits for,
        // might fall behind by two phases of a barrier, and wait for ever.
        if (!GATHER && threadIdx.x > 0) return;
        GatheredRows gathered;
        Walk walk(shared().tiles, rows.num_groups, rows.column_tiles);
        const int products = walk.products();
        // the other block of a cluster can't get far ahead of the one that waits
        const bool sets_pace = threadIdx.x == 0 && cluster_rank() == 0;
        Pace pace{rows.due};
        TileDrawer drawer{rows.drawn};
        Ring ring;
        Tile tile;
        const auto proceed = [&](int n) {
            if (threadIdx.x == 0) drawer.hand_out(shared().queue, n);
            const int index = shared().queue.read(n);
            return GATHER ? same_in_warp(index) : index;
        };
        if (sets_pace) pace.announce();
        for (int n = 0;; ++n) {
            const int index = proceed(n);
            if (index >= products) break;
            walk.find(index, tile);
            if (GATHER) gathered.start(rows.a, rows.row_index + tile.first, tile.count, rows.depth);
            if (sets_pace) pace.wait(index, tile_stride(), products);
            for (int step = 0; step < rows.steps; ++step, ring.advance()) {
                const int k = step * DEPTH;
                if (sets_pace && step == max(0, rows.steps - EARLY)) pace.announce();
                if (threadIdx.x == 0 && step == max(0, rows.steps - ASKING)) drawer.ask();
                wait(ring.empty(), ring.parity ^ 1);
                if (threadIdx.x == 0) {
                    arrive_expecting(ring.full(), SHARED_BYTES + (GATHER ? 0 : OWN_BYTES));
                    copy_part(ring.common_part(), tile, k, ring.full());
                    if (!GATHER) copy_own<OWN, false>(ring.own(), rows.map, tile.first, k, 0, ring.full());
                }
                if (GATHER) {
                    gathered.copy(ring.own());
                    arrive_after_copies(ring.full());
                }
            }
            for (int i = 0; i < MORE_STEPS; ++i, ring.advance()) {
                wait(ring.empty(), ring.parity ^ 1);
                if (threadIdx.x == 0) copy_more(ring, tile, i);
                if (GATHER) arrive_after_copies(ring.full());
            }
        }
        if (threadIdx.x == 0) let_later_kernels_come();
    };
    const auto multiply_all = [&] {
        Walk walk(shared().tiles, rows.num_groups, rows.column_tiles);
        const int products = walk.products();
        Ring ring;
        Tile tile;
        uint32 held = 0;
        for (int n = 0;; ++n) {
            const int index = same_in_warp(shared().queue.read(n));
            if (index >= products) break;
            walk.find(index, tile);
            if (block_row(0) >= tile.count) {
                pass_tile(ring, rows.steps + MORE_STEPS, held);
            } else {
                Sums sums;
                const Ring last = multiply_tile<false, TILE_MAJOR_B>(sums, ring, rows.steps, held);
                held = finish(sums, tile, ring, last);
            }
        }
        for (int index = products + first_tile(); walk.find(index, tile); index += tile_stride()) clear(tile);
        wait_for_reads<0>();
    };
    part(GATHER ? GATHER_ARRIVALS : COPY_ARRIVALS, fetch_all, multiply_all);
}

struct Nothing {
    __device__ __forceinline__ void operator()(const Ring&, const Tile&, int) const {}
};

#endif

#if defined(TRANSPOSE_B)

// out[r, n] = sum_k a[row_index[r], k] b[e][n, k]   (TRANSPOSE_B 1)   or   b[e][k, n]   (0)
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) grouped_gemm(
    const X* a, const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
    const __grid_constant__ TensorMap out_map, const int* offsets, const int* row_index, X* out,
    int num_groups, int num_rows, int chunks, int chunk, int depth, int columns, int column_tiles, uint32* due, int* drawn
) {
    wait_for_earlier_kernels();
    const GroupRows groups = {offsets, num_rows, chunks, chunk};
    const Rows rows = {a, a_map, groups, row_index, num_groups, depth, column_tiles, due, drawn};
    const auto copy_part = [&](uint32 to, const Tile& tile, int k, uint32 full) {
        const int first = tile.column * SHARED + cluster_rank() * PART;
        copy_to_all<PART, !TRANSPOSE_B>(to, b_map, first, k, tile.group, full);
    };
    const auto finish = [&](const Sums& sums, const Tile& tile, const Ring&, const Ring& last) {
        const int first = tile.column * TILE_COLUMNS;
        meet_multipliers(tile.count);
        store_tile<false>(
            sums, last,
            {out + int64(tile.first) * columns + first, columns, out_map, first, tile.first, 0, tile.count,
             columns - first}
        );
        return last.empty();
    };
    const auto clear = [&](const Tile& tile) {
        const int first = tile.column * TILE_COLUMNS;
        clear_tile(out + int64(tile.first) * columns + first, tile.count, columns - first, columns);
    };
    multiply_rows<!TRANSPOSE_B, 0>(rows, copy_part, Nothing(), finish, clear);
}

#elif defined(GLU)

// A tile's first half are gate columns, the second half the up columns that belong to them.
constexpr int GATE_COLUMNS = TILE_COLUMNS / 2;

// z[r] = w_up[e] x[row_index[r]], a = act(gate) * up; w_map is of w_up as [2E, I, H]
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) grouped_glu(
    const X* x, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
    const __grid_constant__ TensorMap z_map, const __grid_constant__ TensorMap a_map, const int* offsets,
    const int* row_index, X* z, X* a,
    int num_groups, int num_rows, int chunks, int chunk, int depth, int intermediate, int column_tiles, uint32* due, int* drawn
) {
    wait_for_earlier_kernels();
    const GroupRows groups = {offsets, num_rows, chunks, chunk};
    const Rows rows = {x, x_map, groups, row_index, num_groups, depth, column_tiles, due, drawn};
    const auto copy_part = [&](uint32 to, const Tile& tile, int k, uint32 full) {
        const int matrix = 2 * tile.group + cluster_rank();
        copy_to_all<PART, false>(to, w_map, tile.column * GATE_COLUMNS, k, matrix, full);
    };
    const auto finish = [&](const Sums& sums, const Tile& tile, const Ring&, const Ring& last) {
        const int first = tile.column * GATE_COLUMNS, columns = min(GATE_COLUMNS, intermediate - first);
        X* z_tile = z + int64(tile.first) * 2 * intermediate + first;
        Buffers buffers{last};
        meet_multipliers(tile.count);
        if (z != nullptr)
#pragma unroll
            for (int column = 0; column < TILE_COLUMNS; column += 64) {
                const int up = column / GATE_COLUMNS;
                store_piece<false, X>(
                    buffers,
                    {z_tile + up * intermediate, 2 * int64(intermediate), z_map, first, tile.first, up,
                     tile.count, columns},
                    warp_row(0), column % GATE_COLUMNS,
                    [&](int n, int half) {
                        const float* two = &sums[0][column / 8 + n][2 * half];
                        return pack2<X>(two[0], two[1]);
                    }
                );
            }
#pragma unroll
        for (int column = 0; column < GATE_COLUMNS; column += 64)
            store_piece<false, X>(
                buffers,
                {a + int64(tile.first) * intermediate + first, intermediate, a_map, first, tile.first, 0,
                 tile.count, columns},
                warp_row(0), column,
                [&](int n, int half) {
                    const float* gate = &sums[0][column / 8 + n][2 * half];
                    const float* up = &sums[0][(column + GATE_COLUMNS) / 8 + n][2 * half];
                    return pack2<X>(
                        activate<true>(ACTIVATION, gate[0]).value * up[0],
                        activate<true>(ACTIVATION, gate[1]).value * up[1]
                    );
                }
            );
        return last.empty();
    };
    const auto clear = [&](const Tile& tile) {
        const int first = tile.column * GATE_COLUMNS, columns = min(GATE_COLUMNS, intermediate - first);
        X* z_tile = z + int64(tile.first) * 2 * intermediate + first;
        if (z != nullptr) {
            clear_tile(z_tile, tile.count, columns, 2 * intermediate);
            clear_tile(z_tile + intermediate, tile.count, columns, 2 * intermediate);
        }
        clear_tile(a + int64(tile.first) * intermediate + first, tile.count, columns, intermediate);
    };
    multiply_rows<false, 0>(rows, copy_part, Nothing(), finish, clear);
}

#elif defined(GLU_BACKWARD)

// After a tile's product z comes through the ring of stages, a piece of its columns at a time: the gates where a
// step's own operand goes, the ups behind them. Their gradients take their place, and p*a goes behind those.
constexpr int PIECE_COLUMNS = 64, PIECES = TILE_COLUMNS / PIECE_COLUMNS;

// Brings the next piece to the front. An epilogue as long as this one takes pieces in a loop: code that names
// every register once does not fit the instruction cache, and costs more than the product.
__device__ __forceinline__ void shift_piece(Sums& sums) {
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int n = 0; n < (TILE_COLUMNS - PIECE_COLUMNS) / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] = sums[m][n + PIECE_COLUMNS / 8][i];
}

// da'[r] = w_down[e]^T dout[row_index[r]]; from it dz, p*a, and for each tile's columns their part of dp
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) grouped_glu_backward(
    const X* dout, const __grid_constant__ TensorMap dout_map, const __grid_constant__ TensorMap w_map,
    const __grid_constant__ TensorMap z_map, const __grid_constant__ TensorMap dz_map,
    const __grid_constant__ TensorMap pa_map, const int* offsets, const int* row_index,
    const float* row_weights, X* dz, X* pa,
    float* dp_parts,
    int num_groups, int num_rows, int chunks, int chunk, int depth, int intermediate, int column_tiles, uint32* due, int* drawn
) {
    wait_for_earlier_kernels();
    const GroupRows groups = {offsets, num_rows, chunks, chunk};
    const Rows rows = {dout, dout_map, groups, row_index, num_groups, depth, column_tiles, due, drawn};
    const auto copy_part = [&](uint32 to, const Tile& tile, int k, uint32 full) {
        copy_to_all<PART, true>(to, w_map, tile.column * SHARED + cluster_rank() * PART, k, tile.group, full);
    };
    const auto copy_piece = [&](const Ring& ring, const Tile& tile, int i) {
        const int column = tile.column * TILE_COLUMNS + i * PIECE_COLUMNS;
        arrive_expecting(ring.full(), 2 * OWN_BYTES);
        copy_own<OWN, false>(ring.own(), z_map, tile.first, column, 0, ring.full());
        copy_own<OWN, false>(ring.common(), z_map, tile.first, column, 1, ring.full());
    };
    const auto finish = [&](Sums& sums, const Tile& tile, Ring& ring, const Ring& last) {
        constexpr int ARRAY = OWN_BYTES / sizeof(X), ROW = SWIZZLE_BYTES / sizeof(X), CHUNK = 8;  // elements
        float dots[2] = {}, weights[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            weights[half] = row_weights[tile.first + min(tile_row(0, half), tile.count - 1)];
        release(last.empty());
        const int first = tile.column * TILE_COLUMNS, columns = intermediate - first;
        X* dz_tile = dz + int64(tile.first) * 2 * intermediate + first;
        const TileOut<X> d_gate = {dz_tile, 2 * int64(intermediate), dz_map, first, tile.first, 0, tile.count, columns};
        const TileOut<X> d_up = {
            dz_tile + intermediate, 2 * int64(intermediate), dz_map, first, tile.first, 1, tile.count, columns
        };
        const TileOut<X> scaled = {
            pa + int64(tile.first) * intermediate + first, intermediate, pa_map, first, tile.first, 0, tile.count,
            columns
        };
        Ring before;
#pragma unroll 1
        for (int i = 0; i < PIECES; ++i, shift_piece(sums), ring.advance()) {
            X* piece = reinterpret_cast<X*>(dynamic_shared<ATOM_BYTES>() + ring.stage * STAGE_BYTES);
            wait(ring.full(), ring.parity);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                constexpr int PAIRS = PIECE_COLUMNS / 8;
                X* row = piece + tile_row(0, half) * ROW + lane() % 4 * 2;
                float gate[PAIRS][2], up[PAIRS][2];
#pragma unroll
                for (int n = 0; n < PAIRS; ++n) {
                    const int at = (n ^ lane() / 4) * CHUNK;  // as the copy engine swizzles
                    load_values(gate[n], row + at);
                    load_values(up[n], row + at + ARRAY);
                }
#pragma unroll
                for (int n = 0; n < PAIRS; ++n) {
                    const int at = (n ^ lane() / 4) * CHUNK;
                    const float da[2] = {sums[0][n][2 * half], sums[0][n][2 * half + 1]};
                    dots[half] += store_glu_gradient(
                        Whole(), ACTIVATION, da, weights[half], gate[n], up[n], row + at, row + at + 2 * ARRAY, ARRAY
                    );
                }
            }
            publish_shared();
            __syncwarp();
            const int row = warp_row(0), column = i * PIECE_COLUMNS;
            const uint32 from = ring.own() + row * SWIZZLE_BYTES;
            if (row < tile.count && column < columns) {
                store_buffer<false>(from, d_gate, row, column);
                store_buffer<false>(from + OWN_BYTES, d_up, row, column);
                store_buffer<false>(from + 2 * OWN_BYTES, scaled, row, column);
            }
            commit_boxes();
            if (i > 0) {
                wait_for_reads<1>();
                __syncwarp();
                release(before.empty());
            }
            before = ring;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile_row(0, half);
            dots[half] += __shfl_xor_sync(ALL_LANES, dots[half], 1);
            dots[half] += __shfl_xor_sync(ALL_LANES, dots[half], 2);
            if (row < tile.count && lane() % 4 == 0)
                dp_parts[int64(tile.column) * num_rows + tile.first + row] = dots[half];
        }
        return before.empty();
    };
    const auto clear = [&](const Tile& tile) {
        const int first = tile.column * TILE_COLUMNS, columns = intermediate - first;
        X* dz_tile = dz + int64(tile.first) * 2 * intermediate + first;
        clear_tile(dz_tile, tile.count, columns, 2 * intermediate);
        clear_tile(dz_tile + intermediate, tile.count, columns, 2 * intermediate);
        clear_tile(pa + int64(tile.first) * intermediate + first, tile.count, columns, intermediate);
        for (int i = threadIdx.x % WARPGROUP; i < tile.count; i += WARPGROUP)
            dp_parts[int64(tile.column) * num_rows + tile.first + i] = 0;
    };
    multiply_rows<true, PIECES>(rows, copy_part, copy_piece, finish, clear);
}

#elif defined(WGRAD)

struct Span {
    int begin, count;
};
struct Part {
    int group;
    Span rows;  // of the group: the contraction
    int first_row, first_column;
};

// As finish of multiply_rows. `to` is the tile's first element, rows and columns what there is of it.
template <bool ADD, class Out>
__device__ __forceinline__ uint32 finish_gradient(
    const Sums& sums, const Ring& last, const Part& tile, int rows, int columns, Out* to, int pitch,
    const TensorMap& out_map
) {
    if constexpr (ADD || sizeof(Out) == 4) {
        release(last.empty());
        update_tile<ADD>(sums, rows, columns, to, pitch);
        return 0;
    } else {
        meet_multipliers(rows);
        store_tile<true>(
            sums, last, {to, pitch, out_map, tile.first_column, tile.first_row, tile.group, rows, columns}
        );
        return last.empty();
    }
}

// out[e][m, n] (+)= scale * sum over the rows r of e of a[r, m] b[r, n]; with GATHER the block's own operand, b if
// SHARE_A and else a, has row index[r] instead
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) grouped_gemm_wgrad(
    const X* a, const __grid_constant__ TensorMap a_map, const X* b, const __grid_constant__ TensorMap b_map,
    const __grid_constant__ TensorMap out_map, const int* offsets, const int* index, type_of<OUT_TYPE>* out,
    int num_groups, int chunks, int a_columns, int b_columns, int row_tiles, int column_tiles, double scale, int* drawn
) {
    wait_for_earlier_kernels();
    const auto rows_of = [&](int group) -> Span {
        const int begin = same_in_warp(offsets[group * chunks]);
        return {begin, same_in_warp(offsets[(group + 1) * chunks]) - begin};
    };
    const int group_tiles = row_tiles * column_tiles, tiles = num_groups * group_tiles;
    if (threadIdx.x == 0) shared().queue.init();
    shared().groups.fill(num_groups, [&](int group) { return offsets[(group + 1) * chunks] - offsets[group * chunks]; });
    const auto group_of = [&](int tile) { return same_in_warp(shared().groups.group[tile / group_tiles]); };
    const auto find = [&](int tile) -> Part {
        const int group = group_of(tile);
        const int before = cluster_rank() * OWN;  // of the own operand
        const Place place = place_in_panels(tile % group_tiles, row_tiles, column_tiles);
        return {
            group, rows_of(group),
            SHARE_A ? place.row * SHARED : place.row * CLUSTER * OWN + before,
            SHARE_A ? place.column * CLUSTER * OWN + before : place.column * SHARED,
        };
    };
    const auto fetch_all = [&] {
        const X* own = SHARE_A ? b : a;
        const X* common = SHARE_A ? a : b;
        const TensorMap& own_map = SHARE_A ? b_map : a_map;
        const TensorMap& common_map = SHARE_A ? a_map : b_map;
        const int own_columns = SHARE_A ? b_columns : a_columns;
        const int common_columns = SHARE_A ? a_columns : b_columns;
        // Tiles are drawn, and row numbers looked up, STAGES steps ahead: a tile that began with that would leave the
        // stages empty.
        TileDrawer drawer{drawn};
        Span ahead = {0, 0};
        int ahead_n = 0, ahead_k = 0;
        bool more = true;
        const auto look_ahead = [&](int stage) {
            if (ahead_k >= ahead.count && more) {
                if (threadIdx.x == 0) {
                    drawer.hand_out(shared().queue, ahead_n);
                    drawer.ask();
                }
                const int tile = same_in_warp(shared().queue.read(ahead_n++));
                more = tile < tiles;
                ahead = more ? rows_of(group_of(tile)) : Span{0, 0};
                ahead_k = 0;
            }
            if (GATHER) {
                if (ahead_k < ahead.count) GatheredColumns::look_up(stage, index + ahead.begin, ahead_k, ahead.count);
                commit_copies();
            }
            ahead_k += DEPTH;
        };
        for (int stage = 0; stage < STAGES; ++stage) look_ahead(stage);
        GatheredColumns gathered;
        Ring ring;
        // The stage's turn, for a tile: so many bytes will come.
        const auto begin_stage = [&](int tile, int bytes) {
            wait(ring.empty(), ring.parity ^ 1);
            if (threadIdx.x > 0) return;
            shared().tile[ring.stage] = tile;
            arrive_expecting(ring.full(), bytes);
        };
        const auto end_stage = [&] {
            arrive_after_copies(ring.full());
            look_ahead(ring.stage);
            ring.advance();
        };
        for (int n = 0;; ++n) {
            const int at = same_in_warp(shared().queue.read(n));
            if (at >= tiles) {
                begin_stage(at, 0);
                arrive_after_copies(ring.full());
                if (threadIdx.x == 0) let_later_kernels_come();
                break;
            }
            const Part tile = find(at);
            const int own_first = SHARE_A ? tile.first_column : tile.first_row;
            const int common_first = SHARE_A ? tile.first_row : tile.first_column;
            if (GATHER) gathered.start(own, own_columns, own_first, tile.rows.count);
            if (tile.rows.count == 0) {
                begin_stage(at, 0);
                end_stage();
            }
            for (int k = 0; k < tile.rows.count; k += DEPTH) {
                // The copy engine would go on into the next group's rows: a last step that is not full is the
                // threads' affair.
                const int left = tile.rows.count - k, row = tile.rows.begin + k;
                const bool whole = left >= DEPTH;
                begin_stage(at, whole ? SHARED_BYTES + (GATHER ? 0 : OWN_BYTES) : 0);
                if (whole && threadIdx.x == 0) {
                    const int first = common_first + cluster_rank() * PART;
                    copy_to_all<PART, true>(ring.common_part(), common_map, first, row, 0, ring.full());
                    if (!GATHER) copy_own<OWN, true>(ring.own(), own_map, own_first, row, 0, ring.full());
                }
                if (GATHER) gathered.copy(ring);
                if (!whole) {
                    const int64 first = row;
                    copy_last_rows<SHARED>(
                        ring.common(), common + first * common_columns, common_columns, common_first, left
                    );
                    if (!GATHER)
                        copy_last_rows<OWN>(
                            ring.own(), own + first * own_columns, own_columns, own_first, left
                        );
                }
                end_stage();
            }
        }
    };
    const auto multiply_all = [&] {
        Ring ring;
        uint32 held = 0;
        for (;;) {
            wait(ring.full(), ring.parity);
            const int at = same_in_warp(shared().tile[ring.stage]);
            if (at >= tiles) break;
            const Part tile = find(at);
            const int steps = (tile.rows.count + DEPTH - 1) / DEPTH;
            const int rows = a_columns - tile.first_row, columns = b_columns - tile.first_column;
            auto* to = out + (int64(tile.group) * a_columns + tile.first_row) * b_columns + tile.first_column;
            if (steps == 0) {
                pass_tile(ring, 1, held);
                if (!ACCUMULATE) clear_tile(to, rows, columns, b_columns);
            } else if (block_row(0) >= rows) {
                pass_tile(ring, steps, held);
            } else {
                Sums sums;
                const Ring last = multiply_tile<true, true>(sums, ring, steps, held);
                scale_all(sums, float(scale));
                held = finish_gradient<ACCUMULATE>(sums, last, tile, rows, columns, to, b_columns, out_map);
            }
        }
        wait_for_reads<0>();
    };
    part(GATHER_ARRIVALS, fetch_all, multiply_all);
}

#endif
