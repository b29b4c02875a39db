// See kernels/common/dynamic_shared.cuh.
#pragma once

inline unsigned char* dynamic_shared() { return machine::shared(0); }
