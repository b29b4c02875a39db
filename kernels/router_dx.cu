// dx of a layer whose logits have gradients at the chosen experts alone: the gather-and-sum of the rows' dx, and the
// chosen experts' rows of the gate's weight, each times its logit's gradient.
//
// Memory-bound as the gather-and-sum alone (permute.cu). A block has a slice of the columns and several tokens: its slice
// of the gate's weight, of all experts, stands in shared memory, and a token takes a few multiplications a column of it.
// Everything is added up in float32, and rounded once.
//
// Compiled with -DX_TYPE=, a code of types.cuh of 16 bits, and -DTOKENS= that a thread sums up at a time, more of them
// where a token has few rows. Widths divide by 8, and addresses by 16 bytes.
#include "common/dynamic_shared.cuh"
#include "common/epilogue.cuh"
#include "common/launch_order.cuh"
#include "common/packed.cuh"
#include "common/types.cuh"

using X = type_of<X_TYPE>;

constexpr int THREADS = 256, BLOCKS = 4;  // a multiprocessor: bytes on their way are what counts
constexpr int WIDTH = 8;                  // columns of a thread
constexpr int LOADS = 8 / TOKENS;         // of each token, on their way at the same time
constexpr int FACTORS = TOKENS < 4 ? LOADS : 1;  // likewise of the gate's part: registers have no room for more

// out[t] = sum over j of rows[token_rows[t, j]], where that names a row, + sum over k of d_chosen[t, k] * gate[e] with
// e = topk_idx[t, k], where that is an expert. `1 << log_lanes` threads share a slice, `slices` make a row of `columns`;
// a block has block_tokens.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) router_dx(
    const X* rows, const int* token_rows, const float* d_chosen, const int* topk_idx, const X* gate, X* out,
    int64 num_tokens, int num_rows, int num_experts, int rows_a_token, int top_k, int columns, int log_lanes, uint32 slices,
    int block_tokens
) {
    after_earlier_kernels();
    using Eight = Packed<X, WIDTH>;
    Eight* slice = reinterpret_cast<Eight*>(dynamic_shared<16>());
    const int lane = threadIdx.x & ((1 << log_lanes) - 1), group = threadIdx.x >> log_lanes;
    const int groups = THREADS >> log_lanes;
    const int column = ((blockIdx.x % slices << log_lanes) + lane) * WIDTH;
    if (column < columns)
        for (int e = group; e < num_experts; e += groups)
            slice[(e << log_lanes) + lane] = load_packed<X, WIDTH>(gate + int64(e) * columns + column);
    __syncthreads();
    if (column >= columns) return;
    const int64 begin = int64(blockIdx.x / slices) * block_tokens, end = min(begin + block_tokens, num_tokens);
    for (int64 first = begin + group * TOKENS; first < end; first += groups * TOKENS) {
        float sums[TOKENS][WIDTH] = {};
        for (int j = 0; j < rows_a_token; j += LOADS) {
            Eight pieces[TOKENS][LOADS];
#pragma unroll
            for (int i = 0; i < TOKENS; ++i)
#pragma unroll
                for (int l = 0; l < LOADS; ++l) {
                    const bool asked = first + i < end && j + l < rows_a_token;
                    const int row = asked ? token_rows[(first + i) * rows_a_token + j + l] : -1;
                    pieces[i][l] = {};
                    if (uint32(row) < uint32(num_rows))
                        pieces[i][l] = load_packed<X, WIDTH>(rows + int64(row) * columns + column);
                }
#pragma unroll
            for (int i = 0; i < TOKENS; ++i)
#pragma unroll
                for (int l = 0; l < LOADS; ++l) pieces[i][l].add_to(sums[i]);
        }
        for (int k = 0; k < top_k; k += FACTORS) {
            int experts[TOKENS][FACTORS];
            float factors[TOKENS][FACTORS];
#pragma unroll
            for (int i = 0; i < TOKENS; ++i)
#pragma unroll
                for (int l = 0; l < FACTORS; ++l) {
                    const bool asked = first + i < end && k + l < top_k;
                    const int64 at = (first + i) * top_k + k + l;
                    const int expert = asked ? topk_idx[at] : -1;
                    const bool chosen = uint32(expert) < uint32(num_experts);
                    experts[i][l] = chosen ? expert : 0;
                    factors[i][l] = chosen ? d_chosen[at] : 0.0f;
                }
#pragma unroll
            for (int i = 0; i < TOKENS; ++i)
#pragma unroll
                for (int l = 0; l < FACTORS; ++l)
                    slice[(experts[i][l] << log_lanes) + lane].add_to(sums[i], factors[i][l]);
        }
#pragma unroll
        for (int i = 0; i < TOKENS; ++i)
            if (first + i < end) store_values(sums[i], out + (first + i) * columns + column);
    }
}
