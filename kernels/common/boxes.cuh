// Pieces of a stage, fetched as boxes of the copy engine.
#pragma once

#include "cluster.cuh"
#include "tma.cuh"
#include "types.cuh"
#include "wgmma.cuh"

// Boxes of a matrix: SIZE rows, the contraction contiguous; or SIZE columns, 64 of them a box. The map says how many
// rows a box has.
template <int SIZE, bool TILE_MAJOR, class CopyBox>
__device__ __forceinline__ void copy_boxes(uint32 to, int first, int k, CopyBox copy) {
    if constexpr (TILE_MAJOR) {
#pragma unroll
        for (int i = 0; i < SIZE / 64; ++i) copy(to + i * TILE_MAJOR_STRIDE, first + 64 * i, k);
    } else {
        copy(to, k, first);
    }
}
// To this block, or to every block of the cluster.
template <int SIZE, bool TILE_MAJOR>
__device__ __forceinline__ void copy_own(
    uint32 to, const TensorMap& map, int first, int k, int matrix, uint32 full
) {
    copy_boxes<SIZE, TILE_MAJOR>(to, first, k, [&](uint32 at, int x, int y) {
        copy_box(at, map, x, y, matrix, full);
    });
}
template <int SIZE, bool TILE_MAJOR>
__device__ __forceinline__ void copy_to_all(
    uint32 to, const TensorMap& map, int first, int k, int matrix, uint32 full
) {
    copy_boxes<SIZE, TILE_MAJOR>(to, first, k, [&](uint32 at, int x, int y) {
        copy_box_to((1 << CLUSTER) - 1, at, map, x, y, matrix, full);
    });
}
