// Which rows are a group's, from offsets on the device.
#pragma once

// Groups whose rows come in `chunks` runs, one after the other: of those the chunk-th. Without chunks, 1 and 0, a group
// has all rows from its offset to the next, and "group num_groups" those behind the last group, up to num_rows.
struct GroupRows {
    const int* offsets;  // [num_groups * chunks + 1]
    int num_rows;
    int chunks;
    int chunk;

    __device__ __forceinline__ int begin(int group, int num_groups) const {
        return offsets[group * chunks + (group < num_groups ? chunk : 0)];
    }
    __device__ __forceinline__ int end(int group, int num_groups) const {
        if (group < num_groups) return offsets[group * chunks + chunk + 1];
        return chunks == 1 ? num_rows : begin(group, num_groups);
    }
};
