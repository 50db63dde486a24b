// cuda/primitives.cuh on the simulator: what an instruction demands of its operands is checked, its model
// computes.
#pragma once
#include "sim/language.h"

namespace dqk {
namespace sim {

enum class Space { global, shared };

// Demands an aligned operand in the right memory, all of it allocated. Names the kernel's line.
inline void check_operand(const void* p, int32_t bytes, uintptr_t alignment, Space space, const char* what,
                          Site site) {
    if (reinterpret_cast<uintptr_t>(p) % alignment != 0)
        fail("misaligned: thread %u gives %s %p, which is not on %d bytes (%s:%d)", current->thread.x, what,
             p, static_cast<int>(alignment), site.file, site.line);
    if (current->stack.holds(p) || is_shared(p) != (space == Space::shared))
        fail("thread %u gives %s an address that is not in %s memory (%s:%d)", current->thread.x, what,
             space == Space::shared ? "shared" : "global", site.file, site.line);
#if defined(__SANITIZE_ADDRESS__)
    if (bytes > 0) {
        const void* bad = __asan_region_is_poisoned(const_cast<void*>(p), static_cast<size_t>(bytes));
        if (bad != nullptr) {
            std::fprintf(stderr, "dqk sim: %s (%s:%d) reaches outside of its operand\n", what, site.file,
                         site.line);
            (void)*static_cast<const volatile char*>(bad);  // ASan has more to say
        }
    }
#endif
    (void)bytes;
}

struct MmaArguments {
    int32_t* c;
    const uint32_t *a, *b;
};
struct LdmatrixArguments {
    uint32_t* r;
    const void* row;
};

}  // namespace sim

inline uint4 load_weights16(const void* p, sim::Site site = sim::Site::here()) {
    sim::check_operand(p, 16, 16, sim::Space::global, "load_weights16", site);
    uint4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline uint2 load_weights8(const void* p, sim::Site site = sim::Site::here()) {
    sim::check_operand(p, 8, 8, sim::Space::global, "load_weights8", site);
    uint2 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void mma_m16n8k32(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         sim::Site site = sim::Site::here()) {
    sim::MmaArguments mine = {c, a, b};
    sim::collective(
        "mma_m16n8k32", 0xFFFFFFFFu, true, &mine,
        [](void* const* arguments, uint32_t) {
            int32_t all_c[sim::kLanes][4];
            uint32_t all_a[sim::kLanes][4], all_b[sim::kLanes][2];
            for (int32_t i = 0; i < sim::kLanes; ++i) {
                const auto* lane = static_cast<const sim::MmaArguments*>(arguments[i]);
                std::memcpy(all_c[i], lane->c, sizeof all_c[i]);
                std::memcpy(all_a[i], lane->a, sizeof all_a[i]);
                std::memcpy(all_b[i], lane->b, sizeof all_b[i]);
            }
            sim::mma_m16n8k32_model(all_c, all_a, all_b);
            for (int32_t i = 0; i < sim::kLanes; ++i)
                std::memcpy(static_cast<sim::MmaArguments*>(arguments[i])->c, all_c[i], sizeof all_c[i]);
        },
        site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, sim::Site site = sim::Site::here()) {
    sim::check_operand(shared_row, 16, 16, sim::Space::shared, "ldmatrix_x4", site);
    sim::LdmatrixArguments mine = {r, shared_row};
    sim::collective(
        "ldmatrix_x4", 0xFFFFFFFFu, true, &mine,
        [](void* const* arguments, uint32_t) {
            uint32_t all[sim::kLanes][4];
            const void* rows[sim::kLanes];
            for (int32_t i = 0; i < sim::kLanes; ++i)
                rows[i] = static_cast<const sim::LdmatrixArguments*>(arguments[i])->row;
            sim::ldmatrix_x4_model(all, rows);
            for (int32_t i = 0; i < sim::kLanes; ++i)
                std::memcpy(static_cast<sim::LdmatrixArguments*>(arguments[i])->r, all[i], sizeof all[i]);
        },
        site);
}

inline int32_t dot4(uint32_t a, uint32_t b, int32_t c) {
    return sim::dot4_model(a, b, c);
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t s) {
    return sim::permute_bytes_model(a, b, s);
}
inline int32_t count_bits(uint32_t bits) {
    return sim::count_bits_model(bits);
}
inline float exp2_approx(float x) {
    return sim::exp2_approx_model(x);
}

inline void copy_async16(void* shared, const void* global, int32_t bytes,
                         sim::Site site = sim::Site::here()) {
    if (bytes < 0 || bytes > 16)
        sim::fail("copy_async16 takes 0..16 bytes, not %d (%s:%d)", bytes, site.file, site.line);
    sim::check_operand(shared, 16, 16, sim::Space::shared, "copy_async16", site);
    if (bytes > 0) sim::check_operand(global, bytes, 16, sim::Space::global, "copy_async16", site);
    sim::scribble(shared, 16);  // whoever still reads it has lost a barrier
    sim::current->copies.push_back({shared, global, bytes, sim::current->group, site});
}
inline void copy_async_commit() {
    ++sim::current->group;
}
template <int kPending>
void copy_async_wait() {
    auto& copies = sim::current->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group + kPending < sim::current->group; ++done)
        sim::copy_async16_model(copies[done].to, copies[done].from, copies[done].bytes);
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

inline int32_t held(int32_t x) {
    return x;
}
struct SharedBytes {
    const unsigned char* address;
};
inline SharedBytes shared_bytes(const void* shared) {
    return {static_cast<const unsigned char*>(shared)};
}
inline uint4 load_shared16(SharedBytes from, int32_t offset, sim::Site site = sim::Site::here()) {
    sim::check_operand(from.address + offset, 16, 16, sim::Space::shared, "load_shared16", site);
    uint4 v;
    std::memcpy(&v, from.address + offset, sizeof v);
    return v;
}
inline uint2 load_shared8(SharedBytes from, int32_t offset, sim::Site site = sim::Site::here()) {
    sim::check_operand(from.address + offset, 8, 8, sim::Space::shared, "load_shared8", site);
    uint2 v;
    std::memcpy(&v, from.address + offset, sizeof v);
    return v;
}
inline void wait_for_producer() {}
inline void release_dependents() {}

inline uint32_t arrive(uint32_t* counter, uint32_t last, sim::Site site = sim::Site::here()) {
    return atomicInc(counter, last, site);
}
inline int32_t atomic_add(int32_t* p, int32_t value, sim::Site site = sim::Site::here()) {
    return atomicAdd(p, value, site);
}
inline void fence() {}
inline int32_t load_fresh(const int32_t* p, sim::Site site = sim::Site::here()) {
    sim::count_poll(site);
    return *static_cast<const volatile int32_t*>(p);
}

}  // namespace dqk
