// The few functions of the CUDA runtime that tests/cuda/primitives.cu calls, for running it on the simulator.
#pragma once
#include <cstdlib>

#include "cuda/launch.h"

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };

inline const char* cudaGetErrorString(cudaError_t) {
    return "out of memory";
}
template <class T>
cudaError_t cudaMallocManaged(T** at, size_t bytes) {
    return posix_memalign(reinterpret_cast<void**>(at), 256, bytes) == 0 ? cudaSuccess
                                                                         : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* at) {
    std::free(at);
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int*) {
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 9;
    return cudaSuccess;
}
