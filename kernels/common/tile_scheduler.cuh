// Which tile of which group a block works on, from the group offsets on the device.
#pragma once

#include "group_rows.cuh"
#include "tile.cuh"
#include "types.cuh"

// The index-th tile over the groups' rows (group_rows.cuh). To be called by all threads of the block; costs a pass of
// a warp over the offsets.
template <int ROWS>
__device__ Tile find_tile(int index, const GroupRows& rows, int num_groups, int column_tiles) {
    constexpr int PER_LANE = 8;
    struct Found {
        int group, first, last;  // the group and its rows
        int before;              // row tiles of the groups before it
    };
    __shared__ Found shared_found;
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x, ordinal = index / column_tiles;
        if (lane == 0) shared_found = {0, 0, 0, ordinal};
        __syncwarp();
        int before = 0;
        for (int base = 0; base <= num_groups && before <= ordinal; base += 32 * PER_LANE) {
            const int group = base + lane * PER_LANE;
            int starts[PER_LANE], ends[PER_LANE], tiles[PER_LANE], through = 0;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                starts[i] = rows.begin(min(group + i, num_groups), num_groups);
                ends[i] = group + i <= num_groups ? rows.end(group + i, num_groups) : starts[i];
            }
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                tiles[i] = int((uint32(ends[i] - starts[i]) + ROWS - 1) / ROWS);
                through += tiles[i];
            }
            const int mine = through;
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(0xffffffffu, through, step);
                if (lane >= step) through += other;
            }
            int at = before + through - mine;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                if (ordinal >= at && ordinal < at + tiles[i])
                    shared_found = {group + i, starts[i], ends[i], at};
                at += tiles[i];
            }
            before += __shfl_sync(0xffffffffu, through, 31);
        }
    }
    __syncthreads();
    const Found found = shared_found;
    const int row_tiles = int((uint32(found.last - found.first) + ROWS - 1) / ROWS);
    const Place place = place_in_panels(index - found.before * column_tiles, row_tiles, column_tiles);
    const int first = found.first + place.row * ROWS;
    return {found.group, first, row_tiles == 0 ? 0 : min(ROWS, found.last - first), place.column};
}
