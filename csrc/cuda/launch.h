// The door between the kernels and their machine: the CUDA runtime, or with -DDQK_SIM the host simulator.
// Only this file and primitives.cuh know which one it is.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dqk/status.h"

#if defined(DQK_SIM)
#include "sim/sim.h"
#else
#include <cuda_runtime.h>

// Shared memory of a fixed size, 16-byte aligned; and what Launch.shared_bytes asks for, likewise.
#define DQK_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DQK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace dqk {

// What a block gets without asking for the larger carve-out, fixed and dynamic shared memory together.
constexpr size_t kMaxSharedBytes = 48 * 1024;

struct Launch {
    uint32_t grid_x = 1, grid_y = 1, grid_z = 1;
    uint32_t threads = 0;
    size_t shared_bytes = 0;
    void* stream = nullptr;  // a cudaStream_t
    // May start before the kernel ahead of it has ended, and then waits in wait_for_producer(). Compute
    // capability 9.0 and newer only, and code compiled for it: older PTX would not wait.
    bool overlap = false;
};

inline bool aligned(const void* pointer, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

#if !defined(DQK_SIM)
inline Status status_of(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return Status::ok;
        case cudaErrorInsufficientDriver:
        case cudaErrorStubLibrary:
            return Status::cuda_no_driver;
        case cudaErrorNoDevice:
            return Status::cuda_no_device;
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:
            return Status::cuda_no_kernel_image;
        case cudaErrorInvalidResourceHandle:
            return Status::cuda_bad_stream;
        default:
            return Status::cuda_failed;
    }
}
#endif

template <class T>
struct Same {
    using type = T;
};

// Queues kernel(args...) on shape.stream; returns before it has run (the simulator: after). Arguments convert
// to the kernel's own parameter types.
template <class... P>
Status launch(void (*kernel)(P...), const Launch& shape, typename Same<P>::type... args) {
    if (shape.shared_bytes > kMaxSharedBytes) return Status::cuda_shared_memory;
#if defined(DQK_SIM)
    const bool ran = sim::run({shape.grid_x, shape.grid_y, shape.grid_z}, shape.threads, shape.shared_bytes,
                              [&] { kernel(args...); });
    return ran ? Status::ok : Status::cuda_failed;
#else
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(shape.stream);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = shape.overlap ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
    if (error != cudaSuccess) (void)cudaGetLastError();  // ours to report: the next caller must not find it
    return status_of(error);
#endif
}

}  // namespace dqk
