// The router's logits of few tokens: logits = x gate^T in float32, at the rate of reading the gate's weight.
//
// A warp takes one expert and up to TOKENS tokens, each lane every 32nd piece of 8 along the contraction. What a token
// gets does not depend on how many others there are. The width must divide by 8 and all arrays be 16-byte aligned.
//
// Defines: X_TYPE, GATE_TYPE (codes of types.cuh, none of them float64), TOKENS.

#include "common/epilogue.cuh"
#include "common/launch_order.cuh"
#include "common/types.cuh"
#include "common/warp.cuh"

using X = type_of<X_TYPE>;
using Gate = type_of<GATE_TYPE>;

constexpr int WARPS = 8;  // the same as in ffmoe_core/cuda/gate_logits_few.pyx
constexpr int WIDTH = 8;

extern "C" __global__ void __launch_bounds__(32 * WARPS) gate_logits_few(
    const X* x, const Gate* gate, float* logits, int num_tokens, int num_experts, int depth
) {
    after_earlier_kernels();
    const int expert = blockIdx.x * WARPS + warp(), first = blockIdx.y * TOKENS;
    if (expert >= num_experts) return;
    gate += int64(expert) * depth;
    // the last one once more where there are fewer: without branches all of them are on their way at the same time
    const X* tokens[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) tokens[t] = x + int64(min(first + t, num_tokens - 1)) * depth;
    float sums[TOKENS] = {};
#pragma unroll 2
    for (int column = lane() * WIDTH; column < depth; column += 32 * WIDTH) {
        float weights[WIDTH];
        load_values(weights, gate + column);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            float values[WIDTH], sum = 0;
            load_values(values, tokens[t] + column);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) sum += values[i] * weights[i];
            sums[t] += sum;
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        const float logit = warp_sum(sums[t]);
        if (lane() == t && first + t < num_tokens) logits[int64(first + t) * num_experts + expert] = logit;
    }
}
