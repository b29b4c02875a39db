// The copy engine of sm_90 (TMA): boxes of a tensor in device memory into shared memory.
#pragma once

#include "types.cuh"

// What cuTensorMapEncodeTiled makes; a kernel takes it as const __grid_constant__ TensorMap.
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

// The box whose first element has these coordinates, innermost first; elements outside the tensor become
// zeros. `barrier` counts the box's bytes.
__device__ __forceinline__ void copy_box(
    uint32 to, const TensorMap& map, int x, int y, int z, uint32 barrier
) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier) : "memory"
    );
}
// The same, into all blocks of the cluster that have a bit in `blocks`, at the same place; each one's barrier
// counts its own copy.
__device__ __forceinline__ void copy_box_to(
    uint32 blocks, uint32 to, const TensorMap& map, int x, int y, int z, uint32 barrier
) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;"
        ::"r"(to), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(uint16(blocks)) : "memory"
    );
}

// A box from shared memory into the tensor, for nothing that will read it soon; elements outside the tensor are left
// out. What ordinary stores put there must have been published to the copy engine.
__device__ __forceinline__ void store_box(const TensorMap& map, int x, int y, int z, uint32 from) {
    uint64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%1, %2, %3}], [%4], %5;"
        ::"l"(&map), "r"(x), "r"(y), "r"(z), "r"(from), "l"(policy) : "memory"
    );
}
// The boxes that this thread has stored since the last time are a group.
__device__ __forceinline__ void commit_boxes() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's newest groups have not been read from shared memory yet.
template <int pending> __device__ __forceinline__ void wait_for_reads() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
