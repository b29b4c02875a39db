// Barriers in shared memory that threads and asynchronous copies arrive at (sm_90).
//
// A barrier counts arrivals and bytes; when all have come its phase ends and it starts again. wait() takes
// the parity of the phase to wait for: 0 for the first, then 1, 0, ...
// A wait sees the newest phase only: it must not begin before the phase ahead of the one it means has ended.
#pragma once

#include "types.cuh"

__device__ __forceinline__ void init_barrier(uint32 barrier, uint32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives at the barrier of the same place in a block of the cluster.
__device__ __forceinline__ void arrive(uint32 barrier, uint32 block) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}\n" ::"r"(barrier), "r"(block) : "memory"
    );
}
// Arrives, and lets the phase wait for so many more bytes.
__device__ __forceinline__ void arrive_expecting(uint32 barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives when all the cp.async that this thread has issued are complete.
__device__ __forceinline__ void arrive_after_copies(uint32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// A word to the same place in a block of the cluster, whose barrier counts its 4 bytes.
__device__ __forceinline__ void send(uint32 block, uint32 to, int word, uint32 barrier) {
    asm volatile(
        "{\n"
        ".reg .b32 there, counting;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 counting, %3, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [counting];\n"
        "}\n" ::"r"(to), "r"(word), "r"(block), "r"(barrier) : "memory"
    );
}

__device__ __forceinline__ void wait(uint32 barrier, uint32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory"
    );
}
