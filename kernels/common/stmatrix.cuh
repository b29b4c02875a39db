// What a tensor core's sums become in shared memory (sm_90): the counterpart of load_matrices.
#pragma once

#include "types.cuh"

// Four 8x8 matrices of 16-bit elements; lane 8*i + j gives the address of row j of matrix i.
__device__ __forceinline__ void store_matrices(uint32 address, const uint32 (&in)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3]) : "memory");
}
