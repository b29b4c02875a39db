// See kernels/common/launch_order.cuh: here kernels run one by one.
#pragma once

inline void after_earlier_kernels() {}
