// See kernels/common/warpgroup.cuh.
#pragma once

constexpr int WARPGROUP = machine::WARPGROUP_THREADS;

template <int registers> void give_registers() {}
template <int registers> void take_registers() {}

inline void meet_at(int barrier, int threads) { machine::block().meetings[barrier].join(threads); }
inline void pass_by(int barrier, int threads) { machine::block().meetings[barrier].arrive(threads); }
