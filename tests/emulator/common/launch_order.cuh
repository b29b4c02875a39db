// See kernels/common/launch_order.cuh: here kernels run one by one.
#pragma once

inline void wait_for_earlier_kernels() {}
inline void let_later_kernels_come() {}
inline void after_earlier_kernels() {}
