// See kernels/common/cluster.cuh.
#pragma once

#include "types.cuh"

inline uint32 cluster_rank() { return blockIdx.x % machine::CLUSTER; }
inline void sync_cluster() {
    machine::clusters[blockIdx.x / machine::CLUSTER].join(machine::CLUSTER * blockDim.x, machine::yield);
}
inline void store_async(uint32 to, uint32 value, uint32 barrier, uint32 block) {
    machine::Block& there = machine::block_of_cluster(block);
    machine::loads.push_back([=, &there, told = &there.barrier(barrier)] {
        memcpy(there.shared + to, &value, sizeof value);
        told->bytes -= sizeof value;
        told->update();
    });
}
