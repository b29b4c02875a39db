// Clusters: blocks that run at the same time and reach each other's shared memory (sm_90).
#pragma once

#include "types.cuh"

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

// 4 bytes to the same place in a block of the cluster, whose barrier there counts them when they have come.
__device__ __forceinline__ void store_async(uint32 to, uint32 value, uint32 barrier, uint32 block) {
    asm volatile(
        "{\n"
        ".reg .b32 there, told;\n"
        "mapa.shared::cluster.u32 there, %0, %3;\n"
        "mapa.shared::cluster.u32 told, %2, %3;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %1, [told];\n"
        "}\n" ::"r"(to), "r"(value), "r"(barrier), "r"(block) : "memory"
    );
}
