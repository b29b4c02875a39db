// See kernels/common/cp_async.cuh.
#pragma once

#include "types.cuh"

inline void prefetch(const void*) {}

inline void copy_async(uint32 to, const void* from, bool there, unsigned bytes) {
    if (to % bytes != 0 || uintptr_t(from) % bytes != 0) machine::stop("cp.async of a place that is not aligned");
    memset(machine::shared(to), 0xff, bytes);
    machine::self->copies.push_back(
        {machine::shared(to), there ? from : nullptr, bytes, nullptr, machine::self->copy_group}
    );
}
inline void copy16_async(uint32 to, const void* from, bool there) { copy_async(to, from, there, 16); }
inline void copy4_async(uint32 to, const void* from, bool there) { copy_async(to, from, there, 4); }
inline void commit_copies() { ++machine::self->copy_group; }
template <int pending> void wait_for_copies() {
    machine::Thread& thread = *machine::self;
    while (!thread.copies.empty() && thread.copies.front().group + pending < thread.copy_group)
        thread.run_first_copy();
}
