// See kernels/common/mma.cuh; the products of sm_80 are missing.
#pragma once

#include "types.cuh"

inline uint32 shared_address(const void* p) {
    return static_cast<const unsigned char*>(p) - machine::block().shared;
}
inline float load_shared(uint32 address) {
    float out;
    memcpy(&out, machine::shared(address), sizeof out);
    return out;
}
inline void load_shared(uint32 (&out)[4], uint32 address) { memcpy(out, machine::shared(address), sizeof out); }
