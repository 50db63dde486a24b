// The instructions that C++ does not have, by name. On the device each is its PTX; in the simulator its model
// from sim/models.h, which tests/cuda/primitives.cu compares with it on a GPU.
#pragma once
#include "cuda/launch.h"

#if defined(DQK_SIM)
#include "sim/primitives.h"
#else

namespace dqk {

// 16 or 8 bytes of global memory that nobody writes meanwhile and nobody reads again: kept out of L1. Not
// .nc, though it would be true: ptxas moves such loads behind wait_for_producer().
__device__ __forceinline__ uint4 load_weights16(const void* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(p)));
    return v;
}
__device__ __forceinline__ uint2 load_weights8(const void* p) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(__cvta_generic_to_global(p)));
    return v;
}

// x, held in a register: without this the compiler works a cheap value out again wherever it is used.
__device__ __forceinline__ int32_t held(int32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Shared memory by its address there. Through a pointer sm_90 works out anew, for every load, which block of
// a cluster it is in (S2R).
struct SharedBytes {
    int32_t address;
};
__device__ __forceinline__ SharedBytes shared_bytes(const void* shared) {
    return {held(static_cast<int32_t>(__cvta_generic_to_shared(shared)))};
}
// 16 or 8 bytes, aligned. Ordered by barriers, like any load.
__device__ __forceinline__ uint4 load_shared16(SharedBytes from, int32_t offset) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from.address + offset));
    return v;
}
__device__ __forceinline__ uint2 load_shared8(SharedBytes from, int32_t offset) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from.address + offset));
    return v;
}

// c += a . b over a warp, int8 into wrapping int32. Lane 4g + t holds of A (16 x 32, row-major) rows g, g +
// 8, g, g + 8 at k = 4t, 4t, 16 + 4t, 16 + 4t; of B (32 x 8) column g at k = 4t, 16 + 4t; of C (16 x 8) row
// g, columns 2t and 2t + 1, then row g + 8.
__device__ __forceinline__ void mma_m16n8k32(int32_t (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 16-byte matrices of shared memory. Lane 8i + j names row j of matrix i (16 bytes, aligned); lane
// 4g + t gets bytes 4t .. 4t + 3 of row g of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared_row)))
                 : "memory");
}

// c + the dot product of four signed bytes.
__device__ __forceinline__ int32_t dot4(uint32_t a, uint32_t b, int32_t c) {
    return __dp4a(static_cast<int32_t>(a), static_cast<int32_t>(b), c);
}

// Byte i of the result is byte s / 16^i % 8 of the eight bytes of a (0 .. 3) and b (4 .. 7).
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t s) {
    return __byte_perm(a, b, s);
}

__device__ __forceinline__ int32_t count_bits(uint32_t bits) {
    return __popc(bits);
}

// 2^x with a relative error below 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Starts copying 16 bytes, of which `bytes` (0..16) are read and the rest is zero. Both ends aligned to 16.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, int32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes)
                 : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the kPending youngest groups of this thread are under way. Others see the bytes after a
// barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// With Launch.overlap: wait until the kernel ahead has ended and its writes are seen; let the next one start.
__device__ __forceinline__ void wait_for_producer() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void release_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Counts 0 .. last and then from 0 again; returns the count before.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter, uint32_t last) {
    return atomicInc(counter, last);
}
__device__ __forceinline__ int32_t atomic_add(int32_t* p, int32_t value) {
    return atomicAdd(p, value);
}
__device__ __forceinline__ void fence() {
    __threadfence();
}
// Past L1, which may hold what stood there before another block wrote.
__device__ __forceinline__ int32_t load_fresh(const int32_t* p) {
    int32_t v;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
    return v;
}

}  // namespace dqk
#endif
