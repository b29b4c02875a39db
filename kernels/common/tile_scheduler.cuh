// Which tile of which group a block works on, from the group offsets on the device.
#pragma once

#include "types.cuh"

struct RowTile {
    int group;     // num_groups stands for the rows behind the last group, which get zeros
    int first;     // first row of the tile
    int count;     // rows of the tile, at most TILE_ROWS; 0: there is no such tile
};

// The index-th tile of TILE_ROWS rows over groups whose rows are offsets[g]..offsets[g+1]; then over the
// rows that follow the last group, up to num_rows. Without offsets all rows are one group.
// To be called by all threads of the block; costs one pass of a warp over the offsets.
template <int TILE_ROWS> __device__ RowTile find_row_tile(int index, const int* offsets, int num_groups, int num_rows) {
    __shared__ RowTile found;
    if (offsets == nullptr) {
        const int first = index * TILE_ROWS;
        return {0, first, max(0, min(TILE_ROWS, num_rows - first))};
    }
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        if (lane == 0) found = {0, 0, 0};
        __syncwarp();
        int before = 0;
        for (int base = 0; base <= num_groups; base += 32) {
            const int group = base + lane;
            int first = 0, last = 0;
            if (group <= num_groups) {
                first = offsets[group];
                last = group < num_groups ? offsets[group + 1] : num_rows;
            }
            const int tiles = (last - first + TILE_ROWS - 1) / TILE_ROWS;
            int through = tiles;
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(0xffffffffu, through, step);
                if (lane >= step) through += other;
            }
            const int mine = index - before - (through - tiles);
            if (mine >= 0 && mine < tiles) {
                const int start = first + mine * TILE_ROWS;
                found = {group, start, min(TILE_ROWS, last - start)};
            }
            before += __shfl_sync(0xffffffffu, through, 31);
            if (before > index) break;
        }
    }
    __syncthreads();
    return found;
}
