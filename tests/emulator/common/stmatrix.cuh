// See kernels/common/stmatrix.cuh.
#pragma once

#include "types.cuh"

inline void store_matrices(uint32 address, const uint32 (&in)[4]) {
    const uint64_t* rows = machine::exchange(address);
    const unsigned lane = machine::lane();
    for (unsigned i = 0; i < 4; ++i) memcpy(machine::shared(rows[8 * i + lane / 4]) + lane % 4 * 4, &in[i], 4);
}
