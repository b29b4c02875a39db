// See kernels/common/tma.cuh.
#pragma once

#include "types.cuh"

// What the emulator's cuTensorMapEncodeTiled makes (emulator.py): of a tensor of 16-bit elements.
struct alignas(64) TensorMap {
    unsigned char* tensor;
    uint64_t sizes[3];    // elements, innermost first
    uint64_t strides[2];  // bytes
    uint32_t box_rows;    // of 64 elements
    unsigned char unused[128 - 8 - 24 - 16 - 4];
};

// Where the byte of an address is: eight rows of 128 bytes have their pieces of 16 bytes in different orders.
inline uint32 swizzled(uint32 address) { return address ^ (address >> 7 & 7) << 4; }

// visit(place, at): every 16 bytes of a box, in shared memory, and in the tensor or null.
template <class Visit>
void visit_box(uint32 shared, const TensorMap& map, int x, int y, int z, Visit visit) {
    for (int row = 0; row < int(map.box_rows); ++row)
        for (int chunk = 0; chunk < 8; ++chunk) {
            const int64_t at[3] = {x + 8 * chunk, y + row, z};
            bool there = true;
            for (int i = 0; i < 3; ++i) there = there && at[i] >= 0 && at[i] < int64_t(map.sizes[i]);
            const int64_t offset = at[2] * int64_t(map.strides[1]) + at[1] * int64_t(map.strides[0]) + 2 * at[0];
            visit(swizzled(shared + row * 128 + chunk * 16), there ? map.tensor + offset : nullptr);
        }
}
inline void check_place(uint32 shared, const TensorMap& map) {
    if (shared % 1024 != 0) machine::stop("a box does not begin with an atom of the swizzle");
    if (shared + map.box_rows * 128 > machine::SHARED_BYTES) machine::stop("a box goes past the end of shared memory");
}

inline void load_box(machine::Block& block, uint32 to, const TensorMap& map, int x, int y, int z, uint32 barrier) {
    check_place(to, map);
    const int bytes = map.box_rows * 128;
    unsigned char* shared = block.shared;
    machine::Barrier* arrival = &block.barrier(barrier);
    memset(shared + to, 0xff, bytes);
    machine::loads.push_back([=] {
        visit_box(to, map, x, y, z, [=](uint32 place, const unsigned char* from) {
            if (from != nullptr)
                memcpy(shared + place, from, 16);
            else
                memset(shared + place, 0, 16);
        });
        arrival->bytes -= bytes;
        arrival->update();
    });
}
inline void copy_box(uint32 to, const TensorMap& map, int x, int y, int z, uint32 barrier) {
    load_box(machine::block(), to, map, x, y, z, barrier);
}
inline void copy_box_to(uint32 blocks, uint32 to, const TensorMap& map, int x, int y, int z, uint32 barrier) {
    for (unsigned rank = 0; rank < machine::CLUSTER; ++rank)
        if (blocks >> rank & 1) load_box(machine::block_of_cluster(rank), to, map, x, y, z, barrier);
}

inline void store_box(const TensorMap& map, int x, int y, int z, uint32 from) {
    check_place(from, map);
    const unsigned char* shared = machine::block().shared;
    const auto run = [=] {
        visit_box(from, map, x, y, z, [=](uint32 place, unsigned char* to) {
            if (to != nullptr) memcpy(to, shared + place, 16);
        });
    };
    machine::self->stores.push_back({run, machine::self->store_group});
}
inline void commit_boxes() { ++machine::self->store_group; }
template <int pending> void wait_for_reads() {
    const machine::Thread& thread = *machine::self;
    const auto open = [&](const machine::Store& store) { return store.group + pending < thread.store_group; };
    while (std::any_of(thread.stores.begin(), thread.stores.end(), open)) machine::yield();
}
