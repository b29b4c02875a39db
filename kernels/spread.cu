// A matrix over all experts from what stands at the chosen ones alone: zeros elsewhere.
//
// Compiled with -DW_TYPE= the type of both (float or double).
#include "common/launch_order.cuh"
#include "common/types.cuh"

using W = type_of<W_TYPE>;

constexpr int WARPS = 8;

// out [T, E] from chosen [T, K] at topk_idx [T, K]. A warp takes a token.
extern "C" __global__ void __launch_bounds__(32 * WARPS) spread(
    const W* chosen, const int* topk_idx, W* out, int64 num_tokens, int num_experts, int top_k
) {
    after_earlier_kernels();
    const int lane = threadIdx.x & 31;
    const int64 t = blockIdx.x * int64(WARPS) + threadIdx.x / 32;
    if (t >= num_tokens) return;
    W* row = out + t * num_experts;
    for (int e = lane; e < num_experts; e += 32) row[e] = 0;
    __syncwarp();
    for (int k = lane; k < top_k; k += 32) {
        const int expert = topk_idx[t * top_k + k];
        if (expert >= 0 && expert < num_experts) row[expert] = chosen[t * top_k + k];
    }
}
