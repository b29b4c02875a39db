// Tensor-core primitives of sm_80: 16x8x16 products of 16-bit elements, and the loads that feed them.
#pragma once

#include "types.cuh"

__device__ __forceinline__ uint32 shared_address(const void* p) {
    return uint32(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ float load_shared(uint32 address) {
    float out;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(out) : "r"(address));
    return out;
}
__device__ __forceinline__ void load_shared(float (&out)[2], uint32 address) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(out[0]), "=f"(out[1]) : "r"(address));
}
__device__ __forceinline__ void load_shared(uint32 (&out)[4], uint32 address) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address));
}

// Four 8x8 matrices of 16-bit elements; lane 8*i + j gives the address of row j of matrix i.
__device__ __forceinline__ void load_matrices(uint32 (&out)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address));
}
__device__ __forceinline__ void load_matrices_transposed(uint32 (&out)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address));
}

// acc += a [16, 16] b [16, 8]
template <class X>
__device__ __forceinline__ void multiply_add(float (&acc)[4], const uint32 (&a)[4], uint32 b0, uint32 b1);

#define FFMOE_MULTIPLY_ADD(X, NAME)                                                                      \
    template <>                                                                                          \
    __device__ __forceinline__ void multiply_add<X>(                                                     \
        float (&acc)[4], const uint32 (&a)[4], uint32 b0, uint32 b1                                      \
    ) {                                                                                                  \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                      \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
                     : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                    \
    }
FFMOE_MULTIPLY_ADD(bfloat16, "bf16")
FFMOE_MULTIPLY_ADD(float16, "f16")
#undef FFMOE_MULTIPLY_ADD
