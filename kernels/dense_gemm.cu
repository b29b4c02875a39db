// The router's products on the tensor cores of sm_80 and newer (mma.sync), to float32's accuracy.
//
// An operand is the exact sum of bfloat16 terms, each the rounded rest of those before it: float32 of three,
// float16 of two, bfloat16 of one. Term i is about 2^-8i of its number, so pairs of terms with i + j > 2 are
// below float32's rounding and are left out. bfloat16 has float32's range: nothing is scaled. (Two float16
// operands are multiplied as they are.) The tensor cores truncate where they add, so they add up few products
// only, the smallest terms first; those sums are added in float32, rounded to the nearest. A result that is rounded
// to 16 bits in the end needs no such care: two terms of float32 are far below that rounding, and so is what the
// tensor cores truncate.
//
// A block computes a 128x128 tile. Operands come in their own type through a ring of shared-memory stages
// filled with cp.async, and are split in registers. All arrays must be 16-byte aligned, and their rows whole pieces of 16
// bytes; grouped_gemm_simt.cu has no such wishes.
//
// Defines: A_TYPE, B_TYPE, OUT_TYPE (codes of types.cuh, none of them float64), TRANSPOSE_A, TRANSPOSE_B 0|1.

#include "common/cp_async.cuh"
#include "common/dynamic_shared.cuh"
#include "common/epilogue.cuh"
#include "common/launch_order.cuh"
#include "common/mma.cuh"
#include "common/packed.cuh"
#include "common/types.cuh"

using TypeA = type_of<A_TYPE>;
using TypeB = type_of<B_TYPE>;
using TypeOut = type_of<OUT_TYPE>;

template <class, class> constexpr bool SAME = false;
template <class X> constexpr bool SAME<X, X> = true;

constexpr bool HALVES = SAME<TypeA, float16> && SAME<TypeB, float16>;
constexpr bool ROUNDED = sizeof(TypeOut) == 2;
constexpr int FLOAT_TERMS = ROUNDED ? 2 : 3;
template <class X> constexpr int TERMS_OF = SAME<X, float> ? FLOAT_TERMS : SAME<X, float16> && !HALVES ? 2 : 1;
constexpr int TERMS_A = TERMS_OF<TypeA>, TERMS_B = TERMS_OF<TypeB>;
template <bool> struct TermType { using type = bfloat16; };
template <> struct TermType<true> { using type = float16; };
using Term = typename TermType<HALVES>::type;

constexpr int TILE = 128;
constexpr int DEPTH = sizeof(TypeA) + sizeof(TypeB) == 4 ? 64 : 32;  // of a stage along the contraction
constexpr int PIECES = TERMS_A + TERMS_B == 2 ? 2 : 1;  // of 16 deep, that the tensor cores add up
constexpr int THREADS = 256;
constexpr int STAGE_BYTES = TILE * DEPTH * int(sizeof(TypeA) + sizeof(TypeB));
constexpr int SHARED_BYTES = 96 * 1024;  // the same as in dense_gemm.pyx
constexpr int STAGES = SHARED_BYTES / STAGE_BYTES;
constexpr int BLOCKS = TERMS_A + TERMS_B <= 4 ? 2 : 1;  // on a multiprocessor

// Eight warps. A warp's side along the operand of more terms is the short one: splitting costs the most.
constexpr bool SPLIT_B = TERMS_B > TERMS_A;
constexpr int WARP_ROWS = SPLIT_B ? 64 : 32, WARP_COLUMNS = SPLIT_B ? 32 : 64;
using Accumulators = float[WARP_ROWS / 16][WARP_COLUMNS / 8][4];
__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / (TILE / WARP_COLUMNS) * WARP_ROWS; }
__device__ __forceinline__ int warp_column() {
    return threadIdx.x / 32 % (TILE / WARP_COLUMNS) * WARP_COLUMNS;
}

// --- operands ---

// One of a fragment's registers as its terms: two neighbours along the contraction.
template <int TERMS>
__device__ __forceinline__ void split(float low, float high, uint32 (&out)[TERMS][4], int i) {
#pragma unroll
    for (int term = 0; term < TERMS; ++term) {
        const uint32 both = pack2<bfloat16>(low, high);
        out[term][i] = both;
        low -= __uint_as_float(both << 16);
        high -= __uint_as_float(both & 0xffff0000u);
    }
}

// TILE x DEPTH pieces of a matrix, element (i, k) of which is outer * pitch + inner behind base, where the
// contraction k is the inner one if ALONG_DEPTH.
template <class X, bool ALONG_DEPTH> struct Operand {
    static constexpr int CHUNK = 16 / int(sizeof(X));  // elements that are copied as one
    static constexpr int LINE = (ALONG_DEPTH ? DEPTH : TILE) / CHUNK, LINE_BYTES = LINE * 16;
    static constexpr int COPIES = TILE * DEPTH / CHUNK / THREADS, STRIDE = THREADS / LINE;

    // Where a chunk of a line is in a stage. The XOR keeps apart, in the banks, the chunks that the copies
    // write and those that the loads below read at the same time.
    static __device__ __forceinline__ uint32 place(int line, int chunk) {
        const int other = sizeof(X) == 4 ? (ALONG_DEPTH ? line & 3 : line / 2 & 3) * 2
                                         : (LINE == 4 ? line / 2 & 3 : line & 7);
        return line * LINE_BYTES + (chunk ^ other) * 16;
    }

    // --- into shared memory: this thread's chunk of lines that are STRIDE apart ---

    const X* from;
    int64 pitch;
    int i, limit;  // of the first; i at and behind limit are zero
    int k, end;    // of the first, in the next step; k at and behind end are zero
    uint32 target;

    __device__ Operand(const X* base, int64 row_pitch, int tile_limit, int depth_begin, int depth_end) {
        const int line = threadIdx.x / LINE, chunk = threadIdx.x % LINE;
        i = ALONG_DEPTH ? line : chunk * CHUNK;
        k = depth_begin + (ALONG_DEPTH ? chunk * CHUNK : line);
        from = base + (ALONG_DEPTH ? i * row_pitch + k : k * row_pitch + i);
        pitch = row_pitch;
        limit = tile_limit;
        end = depth_end;
        target = place(line, chunk);
    }

    // one step after the other
    __device__ __forceinline__ void copy(uint32 stage) {
#pragma unroll
        for (int j = 0; j < COPIES; ++j) {
            const int di = ALONG_DEPTH ? j * STRIDE : 0, dk = ALONG_DEPTH ? 0 : j * STRIDE;
            // lines that are STRIDE, a multiple of 8, apart have the same XOR
            const bool there = i + di < limit && k + dk < end;
            copy16_async(stage + target + j * STRIDE * LINE_BYTES, from + j * STRIDE * pitch, there);
        }
        from += ALONG_DEPTH ? DEPTH : DEPTH * pitch;
        k += DEPTH;
    }

    // --- and from there: the fragments of a warp, whose part of the tile starts at `first` ---

    // Where a lane reads the first of them; the others are a few lines or, by XOR, a few chunks away.
    static __device__ __forceinline__ uint32 origin(int first) {
        const int lane = threadIdx.x % 32;
        if constexpr (sizeof(X) == 2) {
            if constexpr (ALONG_DEPTH) return place(first + lane % 16, lane / 16);
            return place(lane % 8 + lane / 16 * 8, first / CHUNK + lane / 8 % 2);
        } else {
            if constexpr (ALONG_DEPTH) return place(first + lane / 4, lane % 4 / 2) + lane % 2 * 8;
            return place(lane % 4 * 2, (first + lane / 4) / CHUNK) + lane / 4 % 4 * 4;
        }
    }

    // The piece of 16 (i) x 16 (k) at (first + i, k) as the left fragment of a product. As the right one, 8
    // columns are its registers 0 and 2, the next 8 are 1 and 3.
    template <int TERMS>
    static __device__ __forceinline__ void load(uint32 (&out)[TERMS][4], uint32 at, int i, int k) {
        const auto moved = [&](int di, int dk) {
            const int lines = ALONG_DEPTH ? i + di : k + dk, chunks = (ALONG_DEPTH ? k + dk : i + di) / CHUNK;
            return (at ^ chunks * 16) + lines * LINE_BYTES;
        };
        if constexpr (sizeof(X) == 2) {
            uint32 raw[4];
            if constexpr (ALONG_DEPTH)
                load_matrices(raw, moved(0, 0));
            else
                load_matrices_transposed(raw, moved(0, 0));
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                if constexpr (SAME<X, Term>)
                    out[0][r] = raw[r];
                else
                    split(widen(X{uint16(raw[r])}), widen(X{uint16(raw[r] >> 16)}), out, r);
            }
        } else {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const uint32 address = moved(r % 2 * 8, r / 2 * 8);
                float pair[2];
                if constexpr (ALONG_DEPTH) {
                    load_shared(pair, address);
                } else {
                    pair[0] = load_shared(address);
                    pair[1] = load_shared(address + LINE_BYTES);
                }
                split(pair[0], pair[1], out, r);
            }
        }
    }
};

using Left = Operand<TypeA, !TRANSPOSE_A>;
using Right = Operand<TypeB, TRANSPOSE_B>;

// --- the product ---

// (low, high) += a b, 16x16
__device__ __forceinline__ void multiply(
    float (&low)[4], float (&high)[4], const uint32 (&a)[PIECES][TERMS_A][4],
    const uint32 (&b)[PIECES][TERMS_B][4]
) {
    float apart[2][4] = {};
    float (&first)[4] = ROUNDED ? low : apart[0];
    float (&second)[4] = ROUNDED ? high : apart[1];
#pragma unroll
    for (int order = FLOAT_TERMS - 1; order >= 0; --order)
#pragma unroll
        for (int i = 0; i < TERMS_A; ++i) {
            const int j = order - i;
            if (j < 0 || j >= TERMS_B) continue;
#pragma unroll
            for (int p = 0; p < PIECES; ++p) {
                multiply_add<Term>(first, a[p][i], b[p][j][0], b[p][j][2]);
                multiply_add<Term>(second, a[p][i], b[p][j][1], b[p][j][3]);
            }
        }
    if constexpr (!ROUNDED) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            low[i] += apart[0][i];
            high[i] += apart[1][i];
        }
    }
}

// A warp's part of a step: the fragments of the short side are kept, the others pass by. a_at and b_at are
// the stage's places of the warp's first fragments.
__device__ __forceinline__ void multiply_stage(Accumulators& acc, uint32 a_at, uint32 b_at) {
    constexpr int M = WARP_ROWS / 16, N = WARP_COLUMNS / 16;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16 * PIECES) {
        const auto load_a = [&](uint32 (&a)[PIECES][TERMS_A][4], int m) {
#pragma unroll
            for (int p = 0; p < PIECES; ++p) Left::load(a[p], a_at, 16 * m, k + 16 * p);
        };
        const auto load_b = [&](uint32 (&b)[PIECES][TERMS_B][4], int n) {
#pragma unroll
            for (int p = 0; p < PIECES; ++p) Right::load(b[p], b_at, 16 * n, k + 16 * p);
        };
        if constexpr (SPLIT_B) {
            uint32 a[PIECES][TERMS_A][4], b[N][PIECES][TERMS_B][4];
#pragma unroll
            for (int n = 0; n < N; ++n) load_b(b[n], n);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                load_a(a, m);
#pragma unroll
                for (int n = 0; n < N; ++n) multiply(acc[m][2 * n], acc[m][2 * n + 1], a, b[n]);
            }
        } else {
            uint32 a[M][PIECES][TERMS_A][4], b[PIECES][TERMS_B][4];
#pragma unroll
            for (int m = 0; m < M; ++m) load_a(a[m], m);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                load_b(b, n);
#pragma unroll
                for (int m = 0; m < M; ++m) multiply(acc[m][2 * n], acc[m][2 * n + 1], a[m], b);
            }
        }
    }
}

__device__ __forceinline__ void multiply_tile(Accumulators& acc, Left& a, Right& b, int steps) {
    constexpr int BYTES_A = TILE * DEPTH * sizeof(TypeA);
    const uint32 stages = shared_address(dynamic_shared<1024>()), last = stages + (STAGES - 1) * STAGE_BYTES;
    const uint32 a_origin = Left::origin(warp_row()), b_origin = BYTES_A + Right::origin(warp_column());
    const auto copy = [&](int step, uint32 stage) {
        if (step < steps) {
            a.copy(stage);
            b.copy(stage + BYTES_A);
        }
        commit_copies();
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) copy(step, stages + step * STAGE_BYTES);
    uint32 reading = stages, writing = last;
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();  // and every warp has left the stage before this one: the next to be filled
        copy(step + STAGES - 1, writing);
        multiply_stage(acc, reading + a_origin, reading + b_origin);
        writing = reading;
        reading = reading == last ? stages : reading + STAGE_BYTES;
    }
}

// --- epilogue ---

// The sums pass through shared memory, where the stages were: the tensor cores leave a thread two columns here and two
// there, but of rows that are gathered neighbours are to read neighbouring columns.
template <class Out> struct Share {
    static constexpr int WIDTH = 16 / int(sizeof(Out)), LANES = TILE / WIDTH;  // columns of a thread, threads of a row
    static constexpr int STRIDE = THREADS / LANES;                             // between a thread's rows
};
constexpr int PITCH = TILE + 8;  // of sums: the lanes that write at the same time do so in different banks
static_assert(TILE * PITCH * sizeof(float) <= SHARED_BYTES);

// Rows that are added to those of a tile: to row i the ones that token_rows[i, 0 .. top_k) names, if they exist.
struct AddedRows {
    static constexpr int WIDTH = Share<TypeOut>::WIDTH, STRIDE = Share<TypeOut>::STRIDE;
    const TypeOut* rows;  // at the tile's first column
    int64 pitch;
    int count;
    const int* token_rows;  // of the tile's first row
    int top_k;

    // To the values of `row`, of those STRIDE behind it, ..., from `column` on; the tile has so many rows.
    template <int ROWS>
    __device__ __forceinline__ void add(float (&values)[ROWS][WIDTH], int row, int tile_rows, int column) const {
        constexpr int LOADS = 8 / ROWS;  // of a row, on their way at the same time
        for (int first = 0; first < top_k; first += LOADS) {
            int name[ROWS][LOADS];
            Packed<TypeOut, WIDTH> piece[ROWS][LOADS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int k = 0; k < LOADS; ++k)
                    name[i][k] = row + i * STRIDE < tile_rows && first + k < top_k
                        ? token_rows[(row + i * STRIDE) * top_k + first + k] : -1;
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int k = 0; k < LOADS; ++k) {
                    piece[i][k] = {};
                    if (uint32(name[i][k]) < uint32(count))
                        piece[i][k] = load_packed<TypeOut, WIDTH>(rows + name[i][k] * pitch + column);
                }
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int k = 0; k < LOADS; ++k) piece[i][k].add_to(values[i]);
        }
    }
};

__device__ __forceinline__ float* shared_sums() { return reinterpret_cast<float*>(dynamic_shared<1024>()); }

__device__ __forceinline__ void share(const Accumulators& acc) {
    const int lane = threadIdx.x % 32;
    __syncthreads();  // every warp has read its operands
#pragma unroll
    for (int m = 0; m < WARP_ROWS / 8; ++m)
#pragma unroll
        for (int n = 0; n < WARP_COLUMNS / 8; ++n) {
            const float* two = &acc[m / 2][n][m % 2 * 2];
            store_vector(
                shared_sums() + (warp_row() + 8 * m + lane / 4) * PITCH + warp_column() + 8 * n + lane % 4 * 2,
                Vector<float, 2>{two[0], two[1]}
            );
        }
    __syncthreads();
}

// The tile of shared sums, of which so many rows and columns exist, goes to out; add(values, row, column) has finished
// ROWS of a thread's rows before.
template <int ROWS, class Out, class Add>
__device__ __forceinline__ void store_tile(int rows, int columns, Out* out, int64 pitch, Add add) {
    constexpr int WIDTH = Share<Out>::WIDTH, LANES = Share<Out>::LANES, STRIDE = Share<Out>::STRIDE;
    const int column = threadIdx.x % LANES * WIDTH;
    if (column >= columns) return;
    for (int row = threadIdx.x / LANES; row < rows; row += ROWS * STRIDE) {
        float values[ROWS][WIDTH];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) load_values(values[i], shared_sums() + (row + i * STRIDE) * PITCH + column);
        add(values, row, column);
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            if (row + i * STRIDE < rows) store_values(values[i], out + (row + i * STRIDE) * pitch + column);
    }
}

// out[m, n] = sum_k a(m, k) b(k, n), with a stored [k, m] if TRANSPOSE_A else [m, k], and b stored [n, k] if
// TRANSPOSE_B else [k, n]; plus the added rows, which need both to be 0. gridDim.y splits the contraction, without
// added rows; each part goes to its own [rows, columns] of parts, which sum_parts adds in order.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_gemm(
    const TypeA* a, const TypeB* b, TypeOut* out, float* parts, int rows, int columns, int depth,
    int split_depth, int column_tiles, const TypeOut* added_rows, const int* token_rows, int top_k, int num_added
) {
    after_earlier_kernels();
    const int first_row = blockIdx.x / column_tiles * TILE, first_column = blockIdx.x % column_tiles * TILE;
    const int tile_rows = min(rows - first_row, TILE), tile_columns = min(columns - first_column, TILE);
    const int64 at = int64(first_row) * columns + first_column;
    const int begin = blockIdx.y * split_depth, end = min(begin + split_depth, depth);
    Left left(
        a + int64(first_row) * (TRANSPOSE_A ? 1 : depth), TRANSPOSE_A ? rows : depth, tile_rows, begin, end
    );
    Right right(
        b + int64(first_column) * (TRANSPOSE_B ? depth : 1), TRANSPOSE_B ? depth : columns, tile_columns, begin, end
    );
    Accumulators acc = {};
    multiply_tile(acc, left, right, (end - begin + DEPTH - 1) / DEPTH);
    share(acc);
    const auto nothing = [](auto&, int, int) {};
    if (parts != nullptr)
        return store_tile<1>(
            tile_rows, tile_columns, parts + int64(blockIdx.y) * rows * columns + at, columns, nothing
        );
    if (TRANSPOSE_A || TRANSPOSE_B || added_rows == nullptr)
        return store_tile<1>(tile_rows, tile_columns, out + at, columns, nothing);
    const AddedRows added = {
        added_rows + first_column, columns, num_added, token_rows + int64(first_row) * top_k, top_k
    };
    const auto add = [&](auto& values, int row, int column) { added.add(values, row, tile_rows, column); };
    // few rows a token are gathered for several tokens at a time, so that as many are on their way
    if (top_k > 4)
        store_tile<1>(tile_rows, tile_columns, out + at, columns, add);
    else if (top_k > 2)
        store_tile<2>(tile_rows, tile_columns, out + at, columns, add);
    else
        store_tile<4>(tile_rows, tile_columns, out + at, columns, add);
}
