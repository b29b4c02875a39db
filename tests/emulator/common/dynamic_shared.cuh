// See kernels/common/dynamic_shared.cuh.
#pragma once

template <int alignment> unsigned char* dynamic_shared() { return machine::shared(0); }
