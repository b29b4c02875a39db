// Clusters: blocks that run at the same time and reach each other's shared memory (sm_90).
#pragma once

#include "types.cuh"

constexpr int CLUSTER = 2;  // blocks, in the kernels that have clusters

// This block's number in its cluster.
__device__ __forceinline__ uint32 cluster_rank() {
    uint32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all blocks of the cluster meet here.
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
