// Kernels that are launched one behind the other, without the time between them (sm_90 and newer).
//
// A kernel's blocks come to the multiprocessors while the last ones of the kernel before it are still at work, and wait
// here for the end of that; where the launch did not ask for it (launch.pyx) nothing is waited for. Every kernel begins
// with this, before it touches memory: each waits for the one before it, and so for all.
#pragma once

__device__ __forceinline__ void after_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}
