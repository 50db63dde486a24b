// What the simulator must notice: tiny kernels, each right with kMistake = false and wrong in one line with
// true. test_simulator.py says which report or which wrong result each mistake must give.
#include "cuda/primitives.cuh"
#include "protocol.h"

namespace dqk {
namespace {

constexpr uint32_t kAll = 0xFFFFFFFFu;
constexpr int32_t kThreads = 64;  // two warps

// ---- memory: x, out [64] ----------------------------------------------------------------------------------

template <bool kMistake>
__global__ void global_read(const int32_t* x, int32_t* out) {
    const uint32_t i = threadIdx.x;
    out[i] = x[kMistake ? i + 1 : i];
}

template <bool kMistake>
__global__ void global_write(const int32_t* x, int32_t* out) {
    const uint32_t i = threadIdx.x;
    out[kMistake ? i + 1 : i] = x[i];
}

template <bool kMistake>
__global__ void shared_neighbour(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, one, kThreads);
    DQK_SHARED(int32_t, other, kThreads);
    const uint32_t i = threadIdx.x;
    int32_t* pointer = one;  // past the type's own bound: the arena's gap has to see it
    other[i] = 0;
    pointer[kMistake ? i + 1 : i] = x[i];
    out[i] = one[i] + other[i];
}

template <bool kMistake>
__global__ void shared_bound(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, one, kThreads);
    const uint32_t i = threadIdx.x;
    one[kMistake ? i + 1 : i] = x[i];
    out[i] = one[i];
}

template <bool kMistake>
__global__ void dynamic_end(const int32_t* x, int32_t* out) {
    DQK_DYNAMIC_SHARED(bytes);
    auto* words = reinterpret_cast<int32_t*>(bytes);
    const uint32_t i = threadIdx.x;
    words[kMistake ? i + 1 : i] = x[i];
    out[i] = words[i];
}

template <bool kMistake>
__global__ void uninitialised(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, sum, kThreads);
    const uint32_t i = threadIdx.x;
    if (!kMistake) sum[i] = 0;
    sum[i] ^= x[i];
    out[i] = sum[i];
}

template <bool kMistake>
__global__ void misaligned_weights(const int32_t* x, int32_t* out) {
    const uint32_t i = threadIdx.x % 4;
    const uint4 v = load_weights16(x + 4 * i + (kMistake ? 1 : 0));
    out[threadIdx.x] = static_cast<int32_t>(v.x + v.y + v.z + v.w);
}

template <bool kMistake>
__global__ void misaligned_vector(const int32_t* x, int32_t* out) {
    const uint32_t i = threadIdx.x % 4;
    const uint4 v = *reinterpret_cast<const uint4*>(x + 4 * i + (kMistake ? 2 : 0));
    out[threadIdx.x] = static_cast<int32_t>(v.x + v.y + v.z + v.w);
}

template <bool kMistake>
__global__ void weights_end(const int32_t* x, int32_t* out) {
    const uint2 v = load_weights8(x + 2 * (threadIdx.x % 32) + (kMistake ? 2 : 0));
    out[threadIdx.x] = static_cast<int32_t>(v.x + v.y);
}

template <bool kMistake>
__global__ void weights_from_shared(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, copy, kThreads);
    copy[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    const uint4 v = load_weights16(kMistake ? copy : x);
    out[threadIdx.x] = static_cast<int32_t>(v.x);
}

template <bool kMistake>
__global__ void too_much_shared(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, array, kMistake ? 12 * 1024 : 4 * 1024);
    array[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = array[threadIdx.x];
}

// ---- barriers ---------------------------------------------------------------------------------------------

template <bool kMistake>
__global__ void barrier_before(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, tile, kThreads);
    tile[threadIdx.x] = x[threadIdx.x];
    if (!kMistake) __syncthreads();
    out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Were lanes of all warps run in turn, the shuffle would do for a barrier.
template <bool kMistake>
__global__ void shuffle_for_barrier(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, tile, kThreads);
    tile[threadIdx.x] = x[threadIdx.x];
    const int32_t neighbour = __shfl_xor_sync(kAll, x[threadIdx.x], 1);
    if (!kMistake) __syncthreads();
    out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x] ^ neighbour;
}

template <bool kMistake>
__global__ void barrier_after(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, tile, kThreads);
    int32_t sum = 0;
    for (int32_t step = 0; step < 3; ++step) {
        tile[threadIdx.x] = x[threadIdx.x] + step;
        __syncthreads();
        sum += tile[kThreads - 1 - threadIdx.x];
        if (!kMistake) __syncthreads();
    }
    out[threadIdx.x] = sum;
}

template <bool kMistake>
__global__ void skipped_barrier(const int32_t* x, int32_t* out) {
    if (!kMistake || threadIdx.x < 32) __syncthreads();
    out[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
}

template <bool kMistake>
__global__ void early_return(const int32_t* x, int32_t* out) {
    out[threadIdx.x] = x[threadIdx.x];
    if (kMistake && threadIdx.x == 40) return;
    __syncthreads();
}

template <bool kMistake>
__global__ void racing_store(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, slot, 1);
    if (threadIdx.x == 0 || (kMistake && threadIdx.x == 32)) slot[0] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = slot[0];
}

template <bool kMistake>
__global__ void racing_blocks(const int32_t* x, int32_t* out) {
    if (!kMistake || blockIdx.x == 0)
        atomic_add(out + threadIdx.x, x[threadIdx.x]);
    else
        out[threadIdx.x] = static_cast<int32_t>(blockIdx.x) * x[threadIdx.x];
}

// The last block to arrive adds up what the others left. The mistake: the first.
template <bool kMistake>
__global__ void last_block(const int32_t* x, int32_t* out) {
    DQK_SHARED(uint32_t, order, 1);
    atomic_add(out + 1 + threadIdx.x % 32, x[threadIdx.x]);
    fence();
    __syncthreads();
    if (threadIdx.x == 0) order[0] = arrive(reinterpret_cast<uint32_t*>(out), gridDim.x - 1);
    __syncthreads();
    if (order[0] == (kMistake ? 0 : gridDim.x - 1) && threadIdx.x < 31)
        out[33 + threadIdx.x] = load_fresh(out + 1 + threadIdx.x);
}

template <bool kMistake>
__global__ void waits_for_block(const int32_t* x, int32_t* out) {
    atomic_add(out, 1);
    if (kMistake)
        while (load_fresh(out) < static_cast<int32_t>(gridDim.x * blockDim.x)) fence();
    out[1] = x[0];
}

// ---- warps ------------------------------------------------------------------------------------------------

template <bool kMistake>
__global__ void different_warp_operations(const int32_t* x, int32_t* out) {
    int32_t v = x[threadIdx.x];
    if (kMistake && threadIdx.x == 5)
        v += static_cast<int32_t>(__ballot_sync(kAll, 1));
    else
        v += __shfl_xor_sync(kAll, v, 1);
    out[threadIdx.x] = v;
}

template <bool kMistake>
__global__ void lane_at_barrier(const int32_t* x, int32_t* out) {
    if (kMistake && threadIdx.x == 37) __syncthreads();
    out[threadIdx.x] = __shfl_xor_sync(kAll, x[threadIdx.x], 3);
    if (!kMistake || threadIdx.x != 37) __syncthreads();
}

template <bool kMistake>
__global__ void not_in_mask(const int32_t* x, int32_t* out) {
    const uint32_t half = threadIdx.x % 32 < 16 ? 0x0000FFFFu : 0xFFFF0000u;
    out[threadIdx.x] = __shfl_xor_sync(kMistake ? 0x0000FFFFu : half, x[threadIdx.x], 1);
}

template <bool kMistake>
__global__ void missing_syncwarp(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, tile, kThreads);
    tile[threadIdx.x] = x[threadIdx.x];
    if (!kMistake) __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

template <bool kMistake>
__global__ void mma_without_a_lane(const int32_t* x, int32_t* out) {
    int32_t c[4] = {};
    const uint32_t a[4] = {1, 0, 0, 0}, b[2] = {1, 0};
    out[threadIdx.x] = x[threadIdx.x];
    if (kMistake && threadIdx.x == 7) return;
    mma_m16n8k32(c, a, b);
    out[threadIdx.x] += c[0];
}

template <bool kMistake>
__global__ void ldmatrix_operand(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, tile, 128 + 4);
    for (uint32_t i = threadIdx.x; i < 128 + 4; i += blockDim.x) tile[i] = x[i % kThreads];
    __syncthreads();
    uint32_t r[4];
    ldmatrix_x4(r, tile + threadIdx.x % 32 * 4 + (kMistake ? 1 : 0));
    out[threadIdx.x] = static_cast<int32_t>(r[0]);
}

template <bool kMistake>
__global__ void ldmatrix_from_global(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, tile, kThreads);
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    uint32_t r[4];
    ldmatrix_x4(r, kMistake ? x : tile);
    out[threadIdx.x] = static_cast<int32_t>(r[0]);
}

// ---- asynchronous copies: 16 threads copy the 64 words of x -----------------------------------------------

template <bool kMistake>
__global__ void missing_wait(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, tile, kThreads);
    if (threadIdx.x < 16) copy_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);
    copy_async_commit();
    if (!kMistake) copy_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
    copy_async_wait<0>();
}

template <bool kMistake>
__global__ void wait_too_short(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, tile, kThreads);
    DQK_SHARED(int32_t, next, kThreads);
    if (threadIdx.x < 16) copy_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);
    copy_async_commit();
    if (threadIdx.x < 16) copy_async16(next + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    const int32_t v = kMistake ? next[threadIdx.x] : tile[threadIdx.x];
    copy_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = v + next[threadIdx.x];
}

template <bool kMistake>
__global__ void missing_commit(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, tile, kThreads);
    if (threadIdx.x < 16) copy_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);
    if (!kMistake) copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
    copy_async_commit();
    copy_async_wait<0>();
}

template <bool kMistake>
__global__ void never_waited(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, tile, kThreads);
    out[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x < 16) copy_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);
    copy_async_commit();
    if (!kMistake) copy_async_wait<0>();
}

// Two stages. The barrier that is missing: the next copy starts while the other warp still reads its stage.
template <bool kMistake>
__global__ void copy_over_reader(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, stages, 2 * kThreads);
    uint32_t sum = 0;  // wraps without UBSan's word, when it adds up junk
    for (int32_t step = -1; step < 4; ++step) {
        if (!kMistake) __syncthreads();
        if (step < 3 && threadIdx.x % 4 == 0)
            copy_async16(stages + (step + 1) % 2 * kThreads + threadIdx.x, x + threadIdx.x, 16);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        if (step >= 0) {
            const int32_t v = stages[step % 2 * kThreads + kThreads - 1 - threadIdx.x];
            sum += static_cast<uint32_t>(step + 1) * static_cast<uint32_t>(v);
        }
    }
    out[threadIdx.x] = static_cast<int32_t>(sum);
    copy_async_wait<0>();
}

template <bool kMistake>
__global__ void copy_past_row(const int32_t* x, int32_t* out) {
    DQK_SHARED(int32_t, tile, kThreads + 4);
    if (threadIdx.x < 17) {
        const int32_t left = 4 * (kThreads - 4 * static_cast<int32_t>(threadIdx.x));
        copy_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x, kMistake || left > 16 ? 16 : left);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x] + tile[kThreads + threadIdx.x % 4];
}

// ---- what instructions compute ----------------------------------------------------------------------------

__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, int32_t* c) {
    const uint32_t lane = threadIdx.x;
    uint32_t my_a[4], my_b[2];
    int32_t my_c[4];
    for (int32_t i = 0; i < 4; ++i) my_a[i] = a[4 * lane + i];
    for (int32_t i = 0; i < 2; ++i) my_b[i] = b[2 * lane + i];
    for (int32_t i = 0; i < 4; ++i) my_c[i] = c[4 * lane + i];
    mma_m16n8k32(my_c, my_a, my_b);
    for (int32_t i = 0; i < 4; ++i) c[4 * lane + i] = my_c[i];
}

__global__ void ldmatrix_kernel(const int32_t* x, uint32_t* out) {
    DQK_SHARED(int32_t, tile, 128);
    for (uint32_t i = threadIdx.x; i < 128; i += 32) tile[i] = x[i];
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, tile + 4 * threadIdx.x);
    for (int32_t i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

__global__ void dot4_kernel(const uint32_t* a, const uint32_t* b, int32_t* c, int64_t n) {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) c[i] = dot4(a[i], b[i], c[i]);
}

// out: [blocks, threads, 8]
__global__ void warp_kernel(const int32_t* x, int32_t* out, int32_t operand, int32_t width) {
    const uint32_t number = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t first = threadIdx.x / 32 * 32;
    const uint32_t count = blockDim.x - first < 32 ? blockDim.x - first : 32;
    const uint32_t mask = count == 32 ? kAll : (1u << count) - 1;
    const int32_t v = x[number];
    int32_t* mine = out + 8 * number;
    mine[0] = __shfl_sync(mask, v, operand, width);
    mine[1] = __shfl_up_sync(mask, v, static_cast<uint32_t>(operand), width);
    mine[2] = __shfl_down_sync(mask, v, static_cast<uint32_t>(operand), width);
    mine[3] = __shfl_xor_sync(mask, v, operand, width);
    mine[4] = static_cast<int32_t>(__ballot_sync(mask, v % 3 == 0));
    mine[5] = __any_sync(mask, v == operand);
    mine[6] = __all_sync(mask, v >= 0);
    mine[7] = __syncthreads_or(v % 64 == operand);
}

__global__ void copy_kernel(const uint8_t* x, uint8_t* out) {
    DQK_SHARED(uint8_t, tile, 17 * 16);
    copy_async16(tile + 16 * threadIdx.x, x + 16 * threadIdx.x, static_cast<int32_t>(threadIdx.x));
    copy_async_commit();
    copy_async_wait<0>();
    for (int32_t i = 0; i < 16; ++i) out[16 * threadIdx.x + i] = tile[16 * threadIdx.x + i];
}

__global__ void geometry_kernel(int32_t* out) {
    const uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    out[block * blockDim.x + threadIdx.x] =
        static_cast<int32_t>(1000000 * blockIdx.z + 10000 * blockIdx.y + 1000 * blockIdx.x + threadIdx.x);
}

__global__ void nothing_kernel(int32_t* ran) {
    *ran = 1;
}

// ---- the door ---------------------------------------------------------------------------------------------

struct Pair {
    const char* name;
    void (*right)(const int32_t*, int32_t*);
    void (*wrong)(const int32_t*, int32_t*);
    uint32_t blocks, shared_bytes;
};
#define DQK_PAIR(name, blocks, shared) {#name, name<false>, name<true>, blocks, shared}
const Pair kPairs[] = {
    DQK_PAIR(global_read, 1, 0),
    DQK_PAIR(global_write, 1, 0),
    DQK_PAIR(shared_neighbour, 1, 0),
    DQK_PAIR(shared_bound, 1, 0),
    DQK_PAIR(dynamic_end, 1, 256),
    DQK_PAIR(uninitialised, 1, 0),
    DQK_PAIR(misaligned_weights, 1, 0),
    DQK_PAIR(misaligned_vector, 1, 0),
    DQK_PAIR(weights_end, 1, 0),
    DQK_PAIR(weights_from_shared, 1, 0),
    DQK_PAIR(too_much_shared, 1, 32),
    DQK_PAIR(barrier_before, 1, 0),
    DQK_PAIR(barrier_after, 1, 0),
    DQK_PAIR(shuffle_for_barrier, 1, 0),
    DQK_PAIR(skipped_barrier, 1, 0),
    DQK_PAIR(early_return, 1, 0),
    DQK_PAIR(racing_store, 1, 0),
    DQK_PAIR(racing_blocks, 3, 0),
    DQK_PAIR(last_block, 3, 0),
    DQK_PAIR(waits_for_block, 2, 0),
    DQK_PAIR(different_warp_operations, 1, 0),
    DQK_PAIR(lane_at_barrier, 1, 0),
    DQK_PAIR(not_in_mask, 1, 0),
    DQK_PAIR(missing_syncwarp, 1, 0),
    DQK_PAIR(mma_without_a_lane, 1, 0),
    DQK_PAIR(ldmatrix_operand, 1, 0),
    DQK_PAIR(ldmatrix_from_global, 1, 0),
    DQK_PAIR(missing_wait, 1, 0),
    DQK_PAIR(wait_too_short, 1, 0),
    DQK_PAIR(missing_commit, 1, 0),
    DQK_PAIR(never_waited, 1, 0),
    DQK_PAIR(copy_over_reader, 1, 0),
    DQK_PAIR(copy_past_row, 1, 0),
};

Status run(const sim::Request& request) {
    Launch shape;
    shape.threads = kThreads;
    for (const Pair& pair : kPairs)
        if (request.function == pair.name) {
            shape.grid_x = pair.blocks;
            shape.shared_bytes = pair.shared_bytes;
            return launch(request.integer(0) != 0 ? pair.wrong : pair.right, shape,
                          request.pointer<const int32_t>(0), request.pointer<int32_t>(1));
        }
    shape.threads = 32;
    if (request.function == "mma")
        return launch(mma_kernel, shape, request.pointer<uint32_t>(0), request.pointer<uint32_t>(1),
                      request.pointer<int32_t>(2));
    if (request.function == "ldmatrix")
        return launch(ldmatrix_kernel, shape, request.pointer<int32_t>(0), request.pointer<uint32_t>(1));
    if (request.function == "dot4")
        return launch(dot4_kernel, shape, request.pointer<uint32_t>(0), request.pointer<uint32_t>(1),
                      request.pointer<int32_t>(2), request.integer(0));
    if (request.function == "copy") {
        shape.threads = 17;
        return launch(copy_kernel, shape, request.pointer<uint8_t>(0), request.pointer<uint8_t>(1));
    }
    shape.grid_x = static_cast<uint32_t>(request.integer(0));
    shape.grid_y = static_cast<uint32_t>(request.integer(1));
    shape.grid_z = static_cast<uint32_t>(request.integer(2));
    shape.threads = static_cast<uint32_t>(request.integer(3));
    shape.shared_bytes = static_cast<size_t>(request.integer(4));
    if (request.function == "warp")
        return launch(warp_kernel, shape, request.pointer<int32_t>(0), request.pointer<int32_t>(1),
                      static_cast<int32_t>(request.integer(5)), static_cast<int32_t>(request.integer(6)));
    if (request.function == "geometry") return launch(geometry_kernel, shape, request.pointer<int32_t>(0));
    if (request.function == "nothing") return launch(nothing_kernel, shape, request.pointer<int32_t>(0));
    std::fprintf(stderr, "no such function: %s\n", request.function.c_str());
    std::abort();
}

}  // namespace
}  // namespace dqk

int main() {
    dqk::sim::serve(dqk::run);
}
