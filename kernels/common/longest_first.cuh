// Groups in the order of their rows, those with the most first.
#pragma once

#include "types.cuh"

// Made once by every block, in shared memory.
struct LongestFirst {
    static constexpr int MOST_GROUPS = 1024;
    int rows[MOST_GROUPS];   // of each group
    int group[MOST_GROUPS];  // at each place of the order

    // By all threads of a block. rows_of(group) is how many it has; of equals the first comes first. All threads take
    // equally many turns: behind a loop that they leave at different times the compiler keeps nothing in a warp's
    // uniform registers, and the weight gradients, which fetch for all they are worth, take a tenth more time.
    template <class RowsOf> __device__ __forceinline__ void fill(int num_groups, RowsOf rows_of) {
        for (int first = 0; first < num_groups; first += blockDim.x)
            if (first + threadIdx.x < num_groups) rows[first + threadIdx.x] = rows_of(first + threadIdx.x);
        __syncthreads();
        for (int first = 0; first < num_groups; first += blockDim.x) {
            const int mine = first + threadIdx.x, count = rows[min(mine, num_groups - 1)];
            int place = 0;
            for (int other = 0; other < num_groups; ++other)
                place += rows[other] > count || (rows[other] == count && other < mine);
            if (mine < num_groups) group[place] = mine;
        }
        __syncthreads();
    }
};
