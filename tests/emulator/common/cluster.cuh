// See kernels/common/cluster.cuh.
#pragma once

#include "types.cuh"

inline uint32 cluster_rank() { return blockIdx.x % machine::CLUSTER; }
inline void sync_cluster() {
    machine::clusters[blockIdx.x / machine::CLUSTER].join(machine::CLUSTER * blockDim.x, machine::yield);
}
