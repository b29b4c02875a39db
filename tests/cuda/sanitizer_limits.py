"""What racecheck and initcheck say of two kernels that are right, but use what Hopper's kernels are made of.

    compute-sanitizer --tool initcheck python -m tests.cuda.sanitizer_limits store
    compute-sanitizer --tool racecheck python -m tests.cuda.sanitizer_limits ring

`store`: the copy engine stores to memory, which another kernel then reads. initcheck (2025.3) does not see the store,
and reports every read. `ring`: one thread fills a ring of stages with the copy engine, warps read them; barriers say
when a stage is full, and when every warp has read it. racecheck does not follow the latter, and reports each stage's
next filling as a race with its reading.
"""

import sys

import cupy
import numpy as np

COUNT, WIDTH = 16, 128  # pieces, and numbers in one

SOURCE = r"""
typedef unsigned int uint32;
typedef unsigned long long uint64;
constexpr int WIDTH = 128, STAGES = 2;

__device__ uint32 shared_address(const void* pointer) { return uint32(__cvta_generic_to_shared(pointer)); }

__device__ void init(uint64& barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals));
}
__device__ void arrive(uint64& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
__device__ void wait(uint64& barrier, int parity) {
    int done = 0;
    while (!done)
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
            : "=r"(done) : "r"(shared_address(&barrier)), "r"(parity) : "memory"
        );
}

extern "C" __global__ void store(const float* in, float* out, int count) {
    __shared__ alignas(128) float piece[WIDTH];
    for (int i = 0; i < count; ++i) {
        piece[threadIdx.x] = in[i * WIDTH + threadIdx.x];
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        if (threadIdx.x == 0)
            asm volatile(
                "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                "cp.async.bulk.commit_group;\n"
                "cp.async.bulk.wait_group 0;"
                ::"l"(out + i * WIDTH), "r"(shared_address(piece)), "n"(WIDTH * 4) : "memory"
            );
        __syncthreads();
    }
}

extern "C" __global__ void copy(const float* in, float* out, int count) {
    for (int i = threadIdx.x; i < count * WIDTH; i += WIDTH) out[i] = in[i];
}

extern "C" __global__ void ring(const float* in, float* out, int count) {
    __shared__ alignas(128) float pieces[STAGES][WIDTH];
    __shared__ uint64 full[STAGES], empty[STAGES];
    const int reader = int(threadIdx.x) - 32;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            init(full[stage], 1);
            init(empty[stage], WIDTH / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
        const int stage = i % STAGES, parity = i / STAGES & 1;
        if (threadIdx.x == 0) {
            wait(empty[stage], parity ^ 1);
            asm volatile(
                "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%2], %3;\n"
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];"
                ::"r"(shared_address(pieces[stage])), "l"(in + i * WIDTH), "r"(shared_address(full + stage)),
                "n"(WIDTH * 4) : "memory"
            );
        } else if (reader >= 0) {
            wait(full[stage], parity);
            out[i * WIDTH + reader] = pieces[stage][reader];
            __syncwarp();
            if (threadIdx.x % 32 == 0) arrive(empty[stage]);  // for the whole warp
        }
    }
}
"""


def main(name: str) -> int:
    cupy.cuda.set_allocator(None)
    module = cupy.RawModule(code=SOURCE, options=("-std=c++17", "-arch=sm_90a"))
    given = cupy.asarray(np.arange(COUNT * WIDTH, dtype=np.float32))
    made, read = cupy.empty_like(given), cupy.empty_like(given)

    def launch(entry, threads, source, target):
        module.get_function(entry)((1,), (threads,), (source, target, np.int32(COUNT)))

    launch(name, WIDTH if name == "store" else 32 + WIDTH, given, made)
    launch("copy", WIDTH, made, read)
    right = bool((read == given).all())
    print(f"{name}: {'right' if right else 'WRONG'}")
    return 0 if right else 1


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("store", "ring"):
        sys.exit("usage: python -m tests.cuda.sanitizer_limits store|ring")
    sys.exit(main(sys.argv[1]))
