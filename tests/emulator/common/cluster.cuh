// See kernels/common/cluster.cuh.
#pragma once

#include "types.cuh"

constexpr int CLUSTER = machine::CLUSTER;

inline uint32 cluster_rank() { return blockIdx.x % CLUSTER; }
inline void sync_cluster() {
    machine::clusters[blockIdx.x / CLUSTER].join(CLUSTER * blockDim.x);
}
