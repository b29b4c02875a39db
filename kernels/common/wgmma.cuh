// Matrix products of a warpgroup (wgmma, sm_90a): 64 rows times N columns, 16 deep, from shared memory.
//
// Operands are pieces that the copy engine has put down with its 128-byte swizzle: rows of 64 elements, eight
// rows to an atom of 1 KB, aligned to it. The contraction runs either along those rows ("contraction-major":
// one matrix row each) or across them ("tile-major": 64 columns of the tile each, and the next 64 columns
// TILE_MAJOR_STRIDE bytes on). PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", has the layouts.
#pragma once

#include "types.cuh"

constexpr int SWIZZLE_BYTES = 128;  // of a row: 64 elements of 16 bits
constexpr int ATOM_BYTES = 8 * SWIZZLE_BYTES;
constexpr int TILE_MAJOR_STRIDE = 64 * SWIZZLE_BYTES;  // of 64 columns, 64 deep

// Where an operand starts, for either layout.
__device__ __forceinline__ uint64 operand_at(uint32 address) {
    constexpr uint64 SWIZZLE_128 = 1;
    return uint64((address & 0x3ffff) >> 4) | uint64(TILE_MAJOR_STRIDE >> 4) << 16 |
           uint64(ATOM_BYTES >> 4) << 32 | SWIZZLE_128 << 62;
}
// From one 16-deep slice of an operand to the next, in units of operand_at.
template <bool TILE_MAJOR>
constexpr uint64 SLICE = (TILE_MAJOR ? 16 * SWIZZLE_BYTES : 16 * 2) >> 4;

// Before the first product of a group: earlier accesses to its registers have happened.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `pending` of the newest groups are still under way.
template <int pending> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// What ordinary stores and cp.async have put into shared memory, and a barrier made known to this thread, is
// seen by its later products, and by the copy engine.
__device__ __forceinline__ void publish_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Keeps the compiler from moving accesses of finished sums before the wait for them.
template <int N> __device__ __forceinline__ void keep_in_order(float (&sums)[N / 8][4]) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sums[n][i])::"memory");
}

// Multiply<...>::run: sums (+)= a b, a [64, 16], b [16, N]; `add` 0 forgets what was in sums.
template <class X, bool TILE_MAJOR_A, bool TILE_MAJOR_B, int N> struct Multiply;

#define FFMOE_SUMS4(n) "+f"(sums[n][0]), "+f"(sums[n][1]), "+f"(sums[n][2]), "+f"(sums[n][3])
#define FFMOE_SUMS16(n) FFMOE_SUMS4(n), FFMOE_SUMS4(n + 1), FFMOE_SUMS4(n + 2), FFMOE_SUMS4(n + 3)
#define FFMOE_SUMS64(n) FFMOE_SUMS16(n), FFMOE_SUMS16(n + 4), FFMOE_SUMS16(n + 8), FFMOE_SUMS16(n + 12)
// the numbers of the sums' registers, N / 2 of them
#define FFMOE_FIRST_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FFMOE_FIRST_192 \
    FFMOE_FIRST_128 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FFMOE_FIRST_256 \
    FFMOE_FIRST_192 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FFMOE_OPERANDS_128 "%64, %65, added, 1, 1, %67, %68;"
#define FFMOE_ADD_128 "%66"
#define FFMOE_OPERANDS_192 "%96, %97, added, 1, 1, %99, %100;"
#define FFMOE_ADD_192 "%98"
#define FFMOE_OPERANDS_256 "%128, %129, added, 1, 1, %131, %132;"
#define FFMOE_ADD_256 "%130"
#define FFMOE_OUTPUTS_128 FFMOE_SUMS64(0)
#define FFMOE_OUTPUTS_192 FFMOE_SUMS64(0), FFMOE_SUMS16(16), FFMOE_SUMS16(20)
#define FFMOE_OUTPUTS_256 FFMOE_SUMS64(0), FFMOE_SUMS64(16)

#define FFMOE_MULTIPLY(X, NAME, N)                                                                         \
    template <bool TILE_MAJOR_A, bool TILE_MAJOR_B> struct Multiply<X, TILE_MAJOR_A, TILE_MAJOR_B, N> {    \
        static __device__ __forceinline__ void run(float (&sums)[N / 8][4], uint64 a, uint64 b, int add) { \
            asm volatile("{\n.reg .pred added;\nsetp.ne.b32 added, " FFMOE_ADD_##N ", 0;\n"                \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " "               \
                         "{" FFMOE_FIRST_##N "}, " FFMOE_OPERANDS_##N "\n}\n"                              \
                         : FFMOE_OUTPUTS_##N                                                               \
                         : "l"(a), "l"(b), "r"(add), "n"(int(TILE_MAJOR_A)), "n"(int(TILE_MAJOR_B)));      \
        }                                                                                                  \
    };
FFMOE_MULTIPLY(bfloat16, "bf16", 128)
FFMOE_MULTIPLY(bfloat16, "bf16", 192)
FFMOE_MULTIPLY(bfloat16, "bf16", 256)
FFMOE_MULTIPLY(float16, "f16", 128)
FFMOE_MULTIPLY(float16, "f16", 192)
FFMOE_MULTIPLY(float16, "f16", 256)
#undef FFMOE_MULTIPLY
