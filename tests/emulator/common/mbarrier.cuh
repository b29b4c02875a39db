// See kernels/common/mbarrier.cuh.
#pragma once

#include "types.cuh"

inline void init_barrier(uint32 barrier, uint32 arrivals) {
    machine::block().barriers[barrier] = {int(arrivals), int(arrivals)};
}
inline void publish_barriers() {}

inline void arrive_at(machine::Barrier& barrier, long bytes) {
    barrier.bytes += bytes;
    --barrier.missing;
    barrier.update();
}
inline void arrive(uint32 barrier, uint32 block) { arrive_at(machine::block_of_cluster(block).barrier(barrier), 0); }
inline void arrive_expecting(uint32 barrier, uint32 bytes) { arrive_at(machine::block().barrier(barrier), bytes); }
inline void arrive_after_copies(uint32 barrier) {
    machine::self->copies.push_back(
        {nullptr, nullptr, 0, &machine::block().barrier(barrier), machine::self->copy_group}
    );
}

inline void send(uint32 block, uint32 to, int word, uint32 barrier) {
    machine::Block& there = machine::block_of_cluster(block);
    unsigned char* place = there.shared + to;
    machine::Barrier* arrival = &there.barrier(barrier);
    memset(place, 0xff, sizeof word);
    machine::loads.push_back([=] {
        memcpy(place, &word, sizeof word);
        arrival->bytes -= sizeof word;
        arrival->update();
    });
}

// As the hardware's, a wait that comes a phase too late sees that of a later phase.
inline void wait(uint32 barrier, uint32 parity) {
    const machine::Barrier& waited = machine::block().barrier(barrier);
    while (waited.phase % 2 == parity) machine::wait_for_change(waited.phase);
}
