// The router's logits on Hopper's tensor cores (sm_90a: wgmma, TMA): logits = x gate^T in float32, of 16-bit operands.
//
// A block computes 128 tokens by 128 experts. One thread keeps a ring of stages filled, 64 deep each; two warpgroups
// multiply, 64 tokens each. The tensor cores truncate where they add to their sums: what they add up is a stage, and
// stages are added in float32, rounded to the nearest. Both widths must divide by 8 and all arrays be 16-byte aligned.
//
// Defines: X_TYPE (code of types.cuh).

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#error "gate_logits_sm90.cu is for sm_90a"
#endif

#include "common/cluster.cuh"
#include "common/dynamic_shared.cuh"
#include "common/launch_order.cuh"
#include "common/mbarrier.cuh"
#include "common/mma.cuh"
#include "common/tma.cuh"
#include "common/types.cuh"
#include "common/warpgroup.cuh"
#include "common/wgmma.cuh"

using X = type_of<X_TYPE>;

constexpr int TILE = 128, DEPTH = 64;
constexpr int CONSUMERS = 2;  // warpgroups that multiply; one more fetches
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int OPERAND_BYTES = TILE * DEPTH * 2, STAGE_BYTES = 2 * OPERAND_BYTES;
constexpr int STAGES = 6;

struct Barriers {
    uint64 full[STAGES];   // a stage's operands have come
    uint64 empty[STAGES];  // both warpgroups have multiplied them
};

// Step number `step` of a tile: its stage, and the parity of the pass through the stages.
struct Stage {
    uint32 tokens, experts, full, empty, parity;

    __device__ __forceinline__ explicit Stage(int step) {
        const uint32 memory = shared_address(dynamic_shared<ATOM_BYTES>());
        const uint32 i = step % STAGES, barriers = memory + STAGES * STAGE_BYTES;
        tokens = memory + i * STAGE_BYTES;
        experts = tokens + OPERAND_BYTES;
        full = barriers + i * sizeof(uint64);
        empty = full + sizeof(Barriers::full);
        parity = step / STAGES % 2;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) gate_logits(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap gate_map, float* logits,
    int num_tokens, int num_experts, int depth, int column_tiles
) {
    after_earlier_kernels();
    const int first_token = blockIdx.x / column_tiles * TILE, first_expert = blockIdx.x % column_tiles * TILE;
    const int steps = (depth + DEPTH - 1) / DEPTH;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(Stage(i).full, 1);
            init_barrier(Stage(i).empty, CONSUMERS * WARPGROUP / 32);
        }
        publish_barriers();
    }
    __syncthreads();

    const int warpgroup = threadIdx.x / WARPGROUP, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    if (warpgroup == CONSUMERS) {
        if (threadIdx.x % WARPGROUP > 0) return;
        for (int step = 0; step < steps; ++step) {
            const Stage stage(step);
            wait(stage.empty, stage.parity ^ 1);
            arrive_expecting(stage.full, STAGE_BYTES);
            copy_box(stage.tokens, x_map, step * DEPTH, first_token, 0, stage.full);
            copy_box(stage.experts, gate_map, step * DEPTH, first_expert, 0, stage.full);
        }
        return;
    }
    float sums[TILE / 8][4] = {}, product[TILE / 8][4];
    for (int step = 0; step < steps; ++step) {
        const Stage stage(step);
        wait(stage.full, stage.parity);
        const uint64 a = operand_at(stage.tokens + warpgroup * 64 * SWIZZLE_BYTES), b = operand_at(stage.experts);
        begin_products();
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k)
            Multiply<X, false, false, TILE>::run(product, a + k * SLICE<false>, b + k * SLICE<false>, k > 0);
        commit_products();
        wait_for_products<0>();
        keep_in_order<TILE>(product);
        if (lane == 0) arrive(stage.empty, cluster_rank());
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] += product[n][i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = first_token + warpgroup * 64 + warp * 16 + half * 8 + lane / 4;
        float* row = logits + int64(token) * num_experts;
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n) {
            const int expert = first_expert + 8 * n + lane % 4 * 2;
            if (token < num_tokens && expert < num_experts)
                store_vector(row + expert, Vector<float, 2>{sums[n][2 * half], sums[n][2 * half + 1]});
        }
    }
}
