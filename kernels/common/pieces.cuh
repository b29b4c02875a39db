// Finished sums on their way to memory: 16 rows of 64 columns at a time, each warp for itself, through buffers in
// shared memory.
#pragma once

#include "mma.cuh"
#include "stmatrix.cuh"
#include "tma.cuh"
#include "types.cuh"
#include "warp.cuh"
#include "wgmma.cuh"

constexpr int PIECE_BYTES = 16 * SWIZZLE_BYTES;

// A tile of a result: the element it starts at, in memory and in a tensor map, and how much of it exists.
template <class X> struct TileOut {
    X* at;
    int64 pitch;
    const TensorMap& map;
    int x, y, z;
    int rows, columns;
};

// Where a thread's 16 bytes of a warp's rows in a buffer are.
__device__ __forceinline__ uint32 in_buffer(uint32 buffer, int row, int chunk) {
    return buffer + row * SWIZZLE_BYTES + ((chunk ^ row % 8) << 4);
}

// 16 rows of 64 columns from a warp's buffer, published, to the tile, where they are row and column of it. The copy
// engine does it, but for rows behind the last, which may be another group's, unless the map ends there (CLIPPED).
template <bool CLIPPED, class X>
__device__ __forceinline__ void store_buffer(uint32 buffer, const TileOut<X>& to, int row, int column) {
    if (CLIPPED || row + 16 <= to.rows) {
        if (lane() == 0) store_box(to.map, to.x + column, to.y + row, to.z, buffer);
    } else if constexpr (!CLIPPED) {
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            const int at = i + lane() / 8, chunk = lane() % 8;
            Vector<uint32, 4> piece;
            load_shared(piece.at, in_buffer(buffer, at, chunk));
            if (row + at < to.rows && column + chunk * 8 < to.columns)
                stream_vector16(
                    reinterpret_cast<uint32*>(to.at + int64(row + at) * to.pitch + column + chunk * 8), piece
                );
        }
    }
}

// To 16 rows of the tile from `row` on. pair(n, half) are the elements of row 8 half + lane / 4 of them and of columns
// 8 n + 2 (lane % 4) and the one behind it, both from `column` on. buffers.next() is where they may be put.
template <bool CLIPPED, class X, class Buffers, class Pair>
__device__ __forceinline__ void store_piece(Buffers& buffers, const TileOut<X>& to, int row, int column, Pair pair) {
    if (row >= to.rows || column >= to.columns) return;
    const uint32 buffer = buffers.next();
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
        const uint32 four[4] = {pair(n, 0), pair(n, 1), pair(n + 1, 0), pair(n + 1, 1)};
        store_matrices(in_buffer(buffer, lane() % 16, n + lane() / 16), four);
    }
    publish_shared();
    __syncwarp();
    store_buffer<CLIPPED>(buffer, to, row, column);
    commit_boxes();
}

// All of 16 rows' sums: a lane's sums[n][2 half + i] are of row 8 half + lane / 4 and column 8 n + 2 (lane % 4) + i.
template <bool CLIPPED, class X, class Buffers, int N>
__device__ __forceinline__ void store_rows(Buffers& buffers, const TileOut<X>& to, int row, const float (&sums)[N][4]) {
#pragma unroll
    for (int piece = 0; piece < N / 8; ++piece)
        store_piece<CLIPPED>(buffers, to, row, 64 * piece, [&](int n, int half) {
            const float* two = &sums[8 * piece + n][2 * half];
            return pack2<X>(two[0], two[1]);
        });
}
