// dx of a layer where logits have gradients at the chosen experts alone: the gather-and-sum of the rows' dx, and beside it
// the chosen experts' rows of the gate's weight, each times its logit's gradient.
//
// Memory-bound as the gather-and-sum alone (permute.cu). A block has a slice of the columns and several tokens: its slice
// of the gate's weight, of all experts, stands in shared memory, and a token takes a few multiplications a column of it,
// where a product by all experts would be bound by the tensor cores. Everything is in float32, and rounded once.
//
// Compiled with -DX_TYPE= and -DGATE_TYPE=, codes of types.cuh; -DTOKENS= that a thread sums up at a time, more of them
// where a token has few rows. Widths divide by 16 bytes' elements of X, and so do addresses.
#include "common/dynamic_shared.cuh"
#include "common/epilogue.cuh"
#include "common/launch_order.cuh"
#include "common/types.cuh"

using X = type_of<X_TYPE>;
using Gate = type_of<GATE_TYPE>;

constexpr int THREADS = 256;
constexpr int WIDTH = VECTOR_WIDTH<X>;   // columns of a thread
constexpr int LOADS = 8 / TOKENS;        // of each token, on their way at the same time

// out[t] = sum over j of rows[token_rows[t, j]], where that names a row, + sum over k of d_logits[t, e] * gate[e] with
// e = topk_idx[t, k], where that is an expert. `1 << log_lanes` threads share a slice, `slices` make a row of `columns`;
// a block has block_tokens.
extern "C" __global__ void __launch_bounds__(THREADS) router_dx(
    const X* rows, const int* token_rows, const float* d_logits, const int* topk_idx, const Gate* gate, X* out,
    int64 num_tokens, int num_rows, int num_experts, int rows_a_token, int top_k, int columns, int log_lanes, uint32 slices,
    int block_tokens
) {
    after_earlier_kernels();
    Gate* slice = reinterpret_cast<Gate*>(dynamic_shared<16>());
    const int lane = threadIdx.x & ((1 << log_lanes) - 1), group = threadIdx.x >> log_lanes;
    const int groups = THREADS >> log_lanes;
    const int column = ((blockIdx.x % slices << log_lanes) + lane) * WIDTH;
    const bool inside = column < columns;
    for (int e = group; e < num_experts; e += groups) {
        float values[WIDTH] = {};
        if (inside) load_values(values, gate + int64(e) * columns + column);
        store_values(values, slice + ((e << log_lanes) + lane) * WIDTH);
    }
    __syncthreads();
    if (!inside) return;
    const int64 begin = int64(blockIdx.x / slices) * block_tokens, end = min(begin + block_tokens, num_tokens);
    for (int64 first = begin + group * TOKENS; first < end; first += groups * TOKENS) {
        float sums[TOKENS][WIDTH] = {};
        for (int j = 0; j < rows_a_token; j += LOADS) {
            Vector<X, WIDTH> pieces[TOKENS][LOADS];
#pragma unroll
            for (int i = 0; i < TOKENS; ++i)
#pragma unroll
                for (int l = 0; l < LOADS; ++l) {
                    const bool asked = first + i < end && j + l < rows_a_token;
                    const int row = asked ? token_rows[(first + i) * rows_a_token + j + l] : -1;
                    pieces[i][l] = {};
                    if (uint32(row) < uint32(num_rows))
                        pieces[i][l] = load_vector<X, WIDTH>(rows + int64(row) * columns + column);
                }
#pragma unroll
            for (int i = 0; i < TOKENS; ++i)
#pragma unroll
                for (int l = 0; l < LOADS; ++l)
#pragma unroll
                    for (int c = 0; c < WIDTH; ++c) sums[i][c] += widen(pieces[i][l].at[c]);
        }
        for (int k = 0; k < top_k; k += LOADS) {
            float factors[TOKENS][LOADS];
            int experts[TOKENS][LOADS];
#pragma unroll
            for (int i = 0; i < TOKENS; ++i)
#pragma unroll
                for (int l = 0; l < LOADS; ++l) {
                    const bool asked = first + i < end && k + l < top_k;
                    const int expert = asked ? topk_idx[(first + i) * top_k + k + l] : -1;
                    const bool chosen = uint32(expert) < uint32(num_experts);
                    experts[i][l] = chosen ? expert : 0;
                    factors[i][l] = chosen ? d_logits[(first + i) * num_experts + expert] : 0.0f;
                }
#pragma unroll
            for (int i = 0; i < TOKENS; ++i)
#pragma unroll
                for (int l = 0; l < LOADS; ++l) {
                    float weight[WIDTH];
                    load_values(weight, slice + ((experts[i][l] << log_lanes) + lane) * WIDTH);
#pragma unroll
                    for (int c = 0; c < WIDTH; ++c) sums[i][c] += factors[i][l] * weight[c];
                }
        }
#pragma unroll
        for (int i = 0; i < TOKENS; ++i)
            if (first + i < end) store_values(sums[i], out + (first + i) * columns + column);
    }
}
