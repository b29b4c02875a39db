// The router's logits on Hopper's tensor cores (sm_90a: wgmma, TMA): logits = x gate^T in float32, of 16-bit operands.
//
// A block stays, and computes 64 tokens for each of its warpgroups that multiply by 128 experts, one such tile after the
// other. One thread keeps a ring of stages filled, 64 deep each, also while the warpgroups store a tile. The tensor cores
// truncate where they add to their sums: what they add up is a stage, and stages are added in float32, rounded to the
// nearest. The depth must divide by 8, the number of experts by 2, and all arrays be 16-byte aligned.
//
// Defines: X_TYPE (code of types.cuh), CONSUMERS: the warpgroups that multiply, and STAGES.

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

constexpr int EXPERTS = 128, DEPTH = 64;
constexpr int TOKENS = 64 * CONSUMERS;
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;  // one more warpgroup fetches
constexpr int FETCH_REGISTERS = 24, MULTIPLY_REGISTERS = 160;
constexpr int TOKEN_BYTES = TOKENS * DEPTH * 2, STAGE_BYTES = TOKEN_BYTES + EXPERTS * DEPTH * 2;

struct Barriers {
    uint64 full[STAGES];   // a stage's operands have come
    uint64 empty[STAGES];  // all warpgroups have multiplied them
};

// Step number `step` of a block: its stage, and the parity of the pass through the stages.
struct Stage {
    uint32 tokens, experts, full, empty, parity;

    __device__ __forceinline__ explicit Stage(int step) {
        const uint32 memory = shared_address(dynamic_shared<ATOM_BYTES>());
        const uint32 i = step % STAGES, barriers = memory + STAGES * STAGE_BYTES;
        tokens = memory + i * STAGE_BYTES;
        experts = tokens + TOKEN_BYTES;
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
    const int steps = (depth + DEPTH - 1) / DEPTH;
    const int tiles = (num_tokens + TOKENS - 1) / TOKENS * column_tiles;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(Stage(i).full, 1);
            init_barrier(Stage(i).empty, CONSUMERS * WARPGROUP / 32);
        }
        publish_barriers();
    }
    __syncthreads();

    const int warpgroup = threadIdx.x / WARPGROUP, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    int done = 0;  // steps of earlier tiles
    if (warpgroup == CONSUMERS) {
        give_registers<FETCH_REGISTERS>();
        if (threadIdx.x % WARPGROUP > 0) return;
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, done += steps) {
            const int first_token = tile / column_tiles * TOKENS, first_expert = tile % column_tiles * EXPERTS;
            for (int step = 0; step < steps; ++step) {
                const Stage stage(done + step);
                wait(stage.empty, stage.parity ^ 1);
                arrive_expecting(stage.full, STAGE_BYTES);
                copy_box(stage.tokens, x_map, step * DEPTH, first_token, 0, stage.full);
                copy_box(stage.experts, gate_map, step * DEPTH, first_expert, 0, stage.full);
            }
        }
        return;
    }
    take_registers<MULTIPLY_REGISTERS>();
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, done += steps) {
        const int first_token = tile / column_tiles * TOKENS, first_expert = tile % column_tiles * EXPERTS;
        float sums[EXPERTS / 8][4] = {}, product[EXPERTS / 8][4];
        for (int step = 0; step < steps; ++step) {
            const Stage stage(done + step);
            wait(stage.full, stage.parity);
            const uint64 a = operand_at(stage.tokens + warpgroup * 64 * SWIZZLE_BYTES);
            const uint64 b = operand_at(stage.experts);
            begin_products();
#pragma unroll
            for (int k = 0; k < DEPTH / 16; ++k)
                Multiply<X, false, false, EXPERTS>::run(product, a + k * SLICE<false>, b + k * SLICE<false>, k > 0);
            commit_products();
            wait_for_products<0>();
            keep_in_order<EXPERTS>(product);
            if (lane == 0) arrive(stage.empty, cluster_rank());
#pragma unroll
            for (int n = 0; n < EXPERTS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[n][i] += product[n][i];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = first_token + warpgroup * 64 + warp * 16 + half * 8 + lane / 4;
            float* row = logits + int64(token) * num_experts;
#pragma unroll
            for (int n = 0; n < EXPERTS / 8; ++n) {
                const int expert = first_expert + 8 * n + lane % 4 * 2;
                if (token < num_tokens && expert < num_experts)
                    store_vector(row + expert, Vector<float, 2>{sums[n][2 * half], sums[n][2 * half + 1]});
            }
        }
    }
}
