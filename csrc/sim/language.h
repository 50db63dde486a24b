// CUDA's spelling of what sim.h does: keywords, vector types, shared arrays, warp and block functions,
// atomics.
#pragma once
#include "sim/sim.h"

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::dqk::sim::current->thread)
#define blockIdx (::dqk::sim::machine.block)
#define blockDim (::dqk::sim::machine.block_dim)
#define gridDim (::dqk::sim::machine.grid_dim)

// An array of its own per source line and template instance, like __shared__. It has array type, so that
// UBSan checks constant bounds as well. `site` is not const: equal constants may be merged.
#define DQK_SHARED(type, name, count)                                   \
    type(&name)[count] = *reinterpret_cast<type(*)[count]>([] {         \
        static char site;                                               \
        return ::dqk::sim::shared_array(&site, sizeof(type) * (count)); \
    }())
#define DQK_DYNAMIC_SHARED(name) unsigned char* const name = ::dqk::sim::machine.dynamic_shared

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(8) int2 {
    int32_t x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) int4 {
    int32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
    return {x, y};
}
inline int2 make_int2(int32_t x, int32_t y) {
    return {x, y};
}
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    return {x, y, z, w};
}
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) {
    return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

template <class T>
T __ldg(const T* p) {
    return *p;
}

// ---- the block --------------------------------------------------------------------------------------------

inline void __syncthreads(::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    ::dqk::sim::barrier("__syncthreads", 0, site);
}
inline int32_t __syncthreads_or(int32_t predicate, ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    return ::dqk::sim::barrier("__syncthreads_or", predicate, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- the warp ---------------------------------------------------------------------------------------------

namespace dqk {
namespace sim {

struct ShuffleArguments {
    uint64_t value, result;
    int32_t source;
};

template <class T>
T shuffle(const char* what, Shuffle kind, uint32_t mask, T value, int32_t operand, int32_t width, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    ShuffleArguments mine = {};
    std::memcpy(&mine.value, &value, sizeof(T));
    mine.source = shuffle_source(kind, static_cast<int32_t>(current->thread.x % kLanes), operand, width);
    collective(
        what, mask, false, &mine,
        [](void* const* arguments, uint32_t members) {
            for (int32_t i = 0; i < kLanes; ++i) {
                if ((members >> i & 1u) == 0) continue;
                auto* lane = static_cast<ShuffleArguments*>(arguments[i]);
                const auto* from = static_cast<const ShuffleArguments*>(arguments[lane->source]);
                if (from != nullptr)
                    lane->result = from->value;
                else
                    scribble(&lane->result, 8);  // a lane that takes no part: undefined
            }
        },
        site);
    std::memcpy(&value, &mine.result, sizeof(T));
    return value;
}

struct VoteArguments {
    bool predicate;
    uint32_t ballot;
};

inline VoteArguments vote(const char* what, uint32_t mask, bool predicate, Site site) {
    VoteArguments mine = {predicate, 0};
    collective(
        what, mask, false, &mine,
        [](void* const* arguments, uint32_t members) {
            bool predicates[kLanes] = {};
            for (int32_t i = 0; i < kLanes; ++i)
                predicates[i] =
                    arguments[i] != nullptr && static_cast<VoteArguments*>(arguments[i])->predicate;
            const uint32_t bits = ballot_model(predicates, members);
            for (int32_t i = 0; i < kLanes; ++i)
                if (arguments[i] != nullptr)
                    *static_cast<VoteArguments*>(arguments[i]) = {bits == members, bits};
        },
        site);
    return mine;  // predicate: of all of them
}

}  // namespace sim
}  // namespace dqk

inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    ::dqk::sim::collective("__syncwarp", mask, false, nullptr, [](void* const*, uint32_t) {}, site);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int32_t lane, int32_t width = 32,
              ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    return ::dqk::sim::shuffle("__shfl_sync", ::dqk::sim::Shuffle::idx, mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t delta, int32_t width = 32,
                 ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    return ::dqk::sim::shuffle("__shfl_up_sync", ::dqk::sim::Shuffle::up, mask, value,
                               static_cast<int32_t>(delta), width, site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t delta, int32_t width = 32,
                   ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    return ::dqk::sim::shuffle("__shfl_down_sync", ::dqk::sim::Shuffle::down, mask, value,
                               static_cast<int32_t>(delta), width, site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int32_t lanes, int32_t width = 32,
                  ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    return ::dqk::sim::shuffle("__shfl_xor_sync", ::dqk::sim::Shuffle::exclusive_or, mask, value, lanes,
                               width, site);
}
inline uint32_t __ballot_sync(uint32_t mask, int32_t predicate,
                              ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    return ::dqk::sim::vote("__ballot_sync", mask, predicate != 0, site).ballot;
}
inline int32_t __any_sync(uint32_t mask, int32_t predicate,
                          ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    return ::dqk::sim::vote("__any_sync", mask, predicate != 0, site).ballot != 0 ? 1 : 0;
}
inline int32_t __all_sync(uint32_t mask, int32_t predicate,
                          ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    return ::dqk::sim::vote("__all_sync", mask, predicate != 0, site).predicate ? 1 : 0;
}

// ---- atomics: int32_t and uint32_t ------------------------------------------------------------------------

template <class T>
T atomicAdd(T* p, T value, ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    ::dqk::sim::count_poll(site);
    static_assert(sizeof(T) == 4 && T(0.5) == T(0), "32-bit integers: a float sum would depend on its order");
    const T old = *p;
    *p = static_cast<T>(static_cast<uint32_t>(old) + static_cast<uint32_t>(value));
    return old;
}
template <class T>
T atomicMax(T* p, T value, ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    ::dqk::sim::count_poll(site);
    static_assert(sizeof(T) == 4 && T(0.5) == T(0), "32-bit integers");
    const T old = *p;
    *p = std::max(old, value);
    return old;
}
inline uint32_t atomicInc(uint32_t* p, uint32_t last, ::dqk::sim::Site site = ::dqk::sim::Site::here()) {
    ::dqk::sim::count_poll(site);
    const uint32_t old = *p;
    *p = ::dqk::sim::increment_model(old, last);
    return old;
}
