// The tiles of grouped rows for clusters that stay and take one tile after the other.
#pragma once

#include "cluster.cuh"
#include "tile_walk.cuh"
#include "types.cuh"

// A cluster's tiles by their index: the first, and from one to the next.
__device__ __forceinline__ int first_tile() { return blockIdx.x / CLUSTER; }
__device__ __forceinline__ int tile_stride() { return gridDim.x / CLUSTER; }

// Finds tiles by rising index, of which the blocks of a cluster divide the rows: up to OWN are a block's.
template <int OWN> struct ClusterWalk {
    static constexpr int ROWS = CLUSTER * OWN;  // that a list is to be filled for
    TileWalk<ROWS> tiles;

    __device__ ClusterWalk(const TileList& list, int num_groups, int column_tiles)
        : tiles(list, num_groups, column_tiles) {}

    // The first so many are the groups'; then come those of the rows that are nobody's.
    __device__ int products() const { return tiles.list.first_tile[tiles.num_groups]; }

    // The block's part of the cluster's index-th tile; it may have no rows.
    __device__ __forceinline__ bool find(int index, Tile& tile) {
        if (!tiles.find(index, tile)) return false;
        const int share = tile.count > OWN ? OWN : OWN / 2;
        const int before = min(int(cluster_rank()) * share, tile.count);
        tile.first += before;
        tile.count = min(share, tile.count - before);
        return true;
    }
};
