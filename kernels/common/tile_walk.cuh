// The tiles of grouped rows, for blocks that stay and take one tile after the other.
#pragma once

#include "group_rows.cuh"
#include "tile.cuh"
#include "types.cuh"
#include "warp.cuh"

// Where each group's rows and tiles are; made once by every block, in shared memory.
struct TileList {
    static constexpr int MOST_GROUPS = 1024;
    int first_row[MOST_GROUPS + 1];  // of each group, and of the rows behind the last group
    int num_rows[MOST_GROUPS + 1];
    int first_tile[MOST_GROUPS + 2];  // and the end

    // By the first warp, which the block must wait for.
    __device__ void fill(const GroupRows& groups, int num_groups, int tile_rows, int column_tiles) {
        int tiles_before = 0;
        for (int base = 0; base <= num_groups; base += 32) {
            const int group = base + threadIdx.x, read = min(group, num_groups);
            const int begin = groups.begin(read, num_groups);
            const int rows = group > num_groups ? 0 : groups.end(read, num_groups) - begin;
            const int tiles = int((uint32(rows) + tile_rows - 1) / tile_rows) * column_tiles;
            const int through = tiles_before + warp_inclusive_scan(tiles);
            if (group <= num_groups) {
                first_row[group] = begin;
                num_rows[group] = rows;
                first_tile[group] = through - tiles;
            }
            tiles_before = __shfl_sync(ALL_LANES, through, 31);
        }
        if (threadIdx.x == 0) first_tile[num_groups + 1] = tiles_before;
    }
};

// Finds tiles of a list by rising index.
template <int ROWS> struct TileWalk {
    const TileList& list;
    int num_groups, column_tiles;
    int group = 0;

    __device__ TileWalk(const TileList& tiles, int groups, int columns)
        : list(tiles), num_groups(groups), column_tiles(columns) {}

    // The index-th tile; false behind the last one. The rows behind the last group are group num_groups.
    __device__ __forceinline__ bool find(int index, Tile& tile) {
        while (index >= list.first_tile[group + 1])
            if (++group > num_groups) return false;
        const int begin = list.first_row[group], rows = list.num_rows[group];
        const int row_tiles = int((uint32(rows) + ROWS - 1) / ROWS);
        const Place place = place_in_panels(index - list.first_tile[group], row_tiles, column_tiles);
        const int done = place.row * ROWS;
        tile = {group, begin + done, min(ROWS, rows - done), place.column};
        return true;
    }
};
