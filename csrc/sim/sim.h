// Runs CUDA kernels on a CPU. They are compiled as C++ with -DDQK_SIM and, for it to see anything, with ASan
// and UBSan. Every thread of a block has a stack of its own; blocks run one after another.
//
// The eight pitfalls of such a machine, and what becomes of each:
// 1. Schedule. One warp runs until all its lanes wait at a block barrier or have returned, then the next.
//    Blocks, warps and lanes are permuted by the seed, afresh after each barrier. Seeds 2i and 2i + 1 are
//    mirror images: of any two accesses between two barriers each comes first once. Results must not depend
//    on the seed.
// 2. Asynchronous copies are performed by the wait that covers them. From their start to then the destination
//    holds junk, so that a missing wait shows, and a reader that is overwritten too.
// 3. Shared arrays lie in an arena with poisoned gaps and start as junk that depends on the seed.
// 4. A model is not the instruction: tests/cuda/primitives.cu compares them on a GPU.
// 5. Out of scope: memory order, fences, clusters. No kernel may wait for another block; one that polls is
//    reported. Arrival counters work. Dependent launch does nothing here.
// 6. ASan is told of every switch, and a stack is unpoisoned before it is used again (stack.h).
// 7. Kernels include cuda/launch.h and cuda/primitives.cuh, never a CUDA header, and hold no #ifdef.
// 8. Out of scope: bank conflicts, registers, occupancy, speed. Nothing here says anything about them.
//
// One launch at a time in a process. language.h spells this in CUDA, primitives.h adds the instructions.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "sim/models.h"
#include "sim/stack.h"

struct uint3 {
    uint32_t x, y, z;
};
struct dim3 {
    uint32_t x = 1, y = 1, z = 1;
};

namespace dqk {
namespace sim {

constexpr uint32_t kMaxThreads = 1024, kMaxGridYZ = 65535, kMaxSpins = 1u << 16;
constexpr size_t kSharedLimit = 48 * 1024, kArenaBytes = 4 * kSharedLimit, kGap = 64;

// A line of a kernel: as a default argument, here() is the line of the call.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// ---- one lane, one machine --------------------------------------------------------------------------------

struct Copy {
    void* to;
    const void* from;
    int32_t bytes;
    uint32_t group;
    Site site;
};

enum class State : uint8_t { ready, at_barrier, at_warp, done };
// arguments[32]: null for lanes that take no part.
using Together = void (*)(void* const* arguments, uint32_t members);

struct Lane {
    uint3 thread = {0, 0, 0};
    State state = State::done;
    const char* what = nullptr;  // it waits at; with `site`, the identity of a wait
    Site site = {nullptr, 0};
    uint32_t mask = 0;  // of a warp operation
    bool whole = false;
    Together together = nullptr;
    void* arguments = nullptr;
    int32_t predicate = 0;  // of a barrier, and its result
    uint32_t spins = 0;
    uint32_t group = 0;  // copy groups committed so far
    std::vector<Copy> copies;
    Stack stack;
};

struct Machine {
    uint64_t seed = 0, launch = 0, interval = 0;  // interval: barriers of this block passed so far
    dim3 grid_dim, block_dim;
    uint3 block = {0, 0, 0};
    uint64_t block_number = 0;
    std::vector<Lane> lanes;  // kMaxThreads once used, so that they never move
    uint32_t threads = 0;
    const std::function<void()>* body = nullptr;
    char* arena = nullptr;
    size_t arena_used = 0, shared_used = 0;
    unsigned char* dynamic_shared = nullptr;
    std::vector<std::pair<const void*, char*>> arrays;
};
inline Machine machine;
inline Lane* current = nullptr;

// Chooses schedule and junk of the launches that follow; the same seed repeats both.
inline void set_seed(uint64_t seed) {
    machine.seed = seed;
    machine.launch = 0;
}

[[noreturn]] inline __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    std::fflush(stdout);
    std::fprintf(stderr, "dqk sim: ");
    va_list list;
    va_start(list, format);
    std::vfprintf(stderr, format, list);
    va_end(list);
    const uint3& b = machine.block;
    std::fprintf(stderr, "\n    in block (%u, %u, %u) of launch %llu, seed %llu\n", b.x, b.y, b.z,
                 static_cast<unsigned long long>(machine.launch),
                 static_cast<unsigned long long>(machine.seed));
    std::abort();
}

// ---- chance -----------------------------------------------------------------------------------------------

inline uint64_t hash(uint64_t a, uint64_t b) {  // splitmix64's steps; their wrapping is meant
    uint64_t x = a * 0x9E3779B97F4A7C15u + b + 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// An order of 0 .. n-1 that depends on seed / 2, this launch and `key`; odd seeds read it backwards.
inline void permute(uint32_t n, uint64_t key, std::vector<uint32_t>* order) {
    order->resize(n);
    for (uint32_t i = 0; i < n; ++i) (*order)[i] = i;
    uint64_t state = hash(hash(machine.seed / 2, machine.launch), key);
    for (uint32_t i = n; i > 1; --i) {
        state = hash(state, i);
        std::swap((*order)[i - 1], (*order)[state % i]);
    }
    if (machine.seed % 2 != 0) std::reverse(order->begin(), order->end());
}

// Junk without a zero byte that depends on the seed, the launch and the block.
inline void scribble(void* to, size_t bytes) {
    uint64_t state = hash(hash(machine.seed, machine.launch), machine.block_number);
    for (size_t i = 0; i < bytes; i += 8) {
        state = hash(state, i);
        const uint64_t word = state | 0x0101010101010101u;
        std::memcpy(static_cast<char*>(to) + i, &word, std::min<size_t>(8, bytes - i));
    }
}

// ---- shared memory ----------------------------------------------------------------------------------------

inline bool is_shared(const void* p) {
    const char* at = static_cast<const char*>(p);
    return at >= machine.arena && at < machine.arena + kArenaBytes;
}

// Aligned to 16 bytes and no more, like the weakest promise of __align__(16).
inline char* take_shared(size_t bytes) {
    machine.shared_used += (bytes + 15) / 16 * 16;
    if (machine.shared_used > kSharedLimit)
        fail("a block takes %zu bytes of shared memory, %zu is the limit", machine.shared_used, kSharedLimit);
    char* at = machine.arena + machine.arena_used;
    machine.arena_used += (bytes + 15) / 16 * 16 + kGap;
    machine.arena_used += (16 + 128 - machine.arena_used % 128) % 128;
    if (machine.arena_used > kArenaBytes) fail("more shared arrays than the arena has room for");
    DQK_ASAN(ASAN_UNPOISON_MEMORY_REGION(at, bytes));
    scribble(at, bytes);
    return at;
}

inline char* shared_array(const void* site, size_t bytes) {
    for (const auto& known : machine.arrays)
        if (known.first == site) return known.second;
    machine.arrays.emplace_back(site, take_shared(bytes));
    return machine.arrays.back().second;
}

inline void empty_arena(size_t dynamic_bytes) {
    if (machine.arena == nullptr)
        machine.arena = static_cast<char*>(std::aligned_alloc(128, kArenaBytes));  // for the process's life
    machine.arrays.clear();
    machine.arena_used = 16;
    machine.shared_used = 0;
    DQK_ASAN(ASAN_POISON_MEMORY_REGION(machine.arena, kArenaBytes));
    machine.dynamic_shared = reinterpret_cast<unsigned char*>(take_shared(dynamic_bytes));
}

// ---- waiting ----------------------------------------------------------------------------------------------

inline void wait(State state, const char* what, Site site) {
    current->state = state;
    current->what = what;
    current->site = site;
    current->stack.leave(false);
}

// Waits for the lanes of `mask` (those that have not returned; `whole`: all 32 must take part), then
// `together` runs once over their arguments.
inline void collective(const char* what, uint32_t mask, bool whole, void* arguments, Together together,
                       Site site) {
    if ((mask >> (current->thread.x % kLanes) & 1u) == 0)
        fail("thread %u is not in its own mask %08x: %s (%s:%d)", current->thread.x, mask, what, site.file,
             site.line);
    current->mask = mask;
    current->whole = whole;
    current->arguments = arguments;
    current->together = together;
    wait(State::at_warp, what, site);
}

inline bool same_wait(const Lane& a, const Lane& b) {
    return a.state == b.state && std::strcmp(a.what, b.what) == 0 && a.site.line == b.site.line &&
           std::strcmp(a.site.file, b.site.file) == 0;
}

[[noreturn]] inline void fail_apart(const Lane& a, const Lane& b) {
    if (b.state == State::done)
        fail("thread %u waits at %s (%s:%d), thread %u has returned from the kernel", a.thread.x, a.what,
             a.site.file, a.site.line, b.thread.x);
    fail("thread %u waits at %s (%s:%d), thread %u at %s (%s:%d)", a.thread.x, a.what, a.site.file,
         a.site.line, b.thread.x, b.what, b.site.file, b.site.line);
}

// Lets the lanes that `first` waits for go on, if all have come. `explain`: if not, says why and ends.
inline bool converge(Lane* warp, uint32_t count, const Lane& first, bool explain) {
    void* arguments[kLanes] = {};
    uint32_t members = 0;
    for (uint32_t i = 0; i < kLanes; ++i) {
        if ((first.mask >> i & 1u) == 0) continue;
        const bool exists = i < count;
        if (first.whole && !exists)
            fail("%s (%s:%d) needs 32 lanes, this warp has %u", first.what, first.site.file, first.site.line,
                 count);
        if (!exists || (warp[i].state == State::done && !first.whole)) continue;
        if (!same_wait(warp[i], first) || warp[i].mask != first.mask) {
            if (explain) fail_apart(first, warp[i]);
            return false;
        }
        arguments[i] = warp[i].arguments;
        members |= 1u << i;
    }
    const Together together = first.together;
    for (uint32_t i = 0; i < count; ++i)
        if ((members >> i & 1u) != 0) warp[i].state = State::ready;
    together(arguments, members);
    return true;
}

inline void resume(Lane* lane) {
    current = lane;
    lane->spins = 0;
    lane->stack.resume();
}

// Until every lane is at a block barrier or done.
inline void run_warp(uint32_t number) {
    static std::vector<uint32_t> order;
    const uint32_t count = std::min<uint32_t>(kLanes, machine.threads - number * kLanes);
    Lane* warp = &machine.lanes[number * kLanes];
    permute(count, hash(hash(machine.block_number, machine.interval), 1 + number), &order);
    for (bool moved = true; moved;) {
        for (const uint32_t i : order)
            if (warp[i].state == State::ready) resume(&warp[i]);
        moved = false;
        for (const uint32_t i : order)
            if (warp[i].state == State::at_warp) moved = converge(warp, count, warp[i], false) || moved;
    }
    for (const uint32_t i : order)
        if (warp[i].state == State::at_warp) converge(warp, count, warp[i], true);
}

// Blocks run one after another: a lane that reads the same counter for ever would hang.
inline void count_poll(Site site) {
    if (++current->spins > kMaxSpins)
        fail("deadlock: thread %u polls for ever, and blocks run one after another (%s:%d)",
             current->thread.x, site.file, site.line);
}

inline int32_t barrier(const char* what, int32_t predicate, Site site) {
    current->predicate = predicate;
    wait(State::at_barrier, what, site);
    return current->predicate;
}

// True if all threads were at one barrier and may go on; false if all have returned.
inline bool pass_barrier() {
    const Lane *waiting = nullptr, *gone = nullptr;
    int32_t any = 0;
    for (uint32_t i = 0; i < machine.threads; ++i) {
        const Lane& lane = machine.lanes[i];
        if (lane.state == State::done) {
            gone = &lane;
            continue;
        }
        if (waiting == nullptr) waiting = &lane;
        if (!same_wait(*waiting, lane)) fail_apart(*waiting, lane);
        any |= lane.predicate != 0 ? 1 : 0;
    }
    if (waiting == nullptr) return false;
    if (gone != nullptr) fail_apart(*waiting, *gone);
    for (uint32_t i = 0; i < machine.threads; ++i) {
        machine.lanes[i].state = State::ready;
        machine.lanes[i].predicate = any;
    }
    ++machine.interval;
    return true;
}

// One thread, on its stack.
inline void run_lane() {
    (*machine.body)();
    if (!current->copies.empty())
        fail("thread %u returns, and nobody has waited for its copy_async16 (%s:%d)", current->thread.x,
             current->copies[0].site.file, current->copies[0].site.line);
    current->state = State::done;
}

inline void run_block(size_t shared_bytes) {
    static std::vector<uint32_t> order;
    empty_arena(shared_bytes);
    machine.interval = 0;
    for (uint32_t i = 0; i < machine.threads; ++i) {
        Lane& lane = machine.lanes[i];
        lane.thread = {i, 0, 0};
        lane.state = State::ready;
        lane.group = 0;
        if (!lane.stack.start(run_lane)) fail("no memory for the stack of thread %u", i);
    }
    do {
        permute((machine.threads + kLanes - 1) / kLanes, hash(machine.block_number, machine.interval),
                &order);
        for (const uint32_t number : order) run_warp(number);
    } while (pass_barrier());
}

// Runs `body` once per thread. False, and nothing has run: sizes that CUDA refuses.
inline bool run(dim3 grid, uint32_t threads, size_t shared_bytes, const std::function<void()>& body) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > kMaxGridYZ ||
        grid.z > kMaxGridYZ || threads == 0 || threads > kMaxThreads || shared_bytes > kSharedLimit)
        return false;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (blocks > 0xFFFFFFFFu)
        fail("%llu blocks are too many to simulate", static_cast<unsigned long long>(blocks));
    machine.lanes.resize(kMaxThreads);
    machine.grid_dim = grid;
    machine.block_dim = {threads, 1, 1};
    machine.threads = threads;
    machine.body = &body;
    std::vector<uint32_t> order;
    permute(static_cast<uint32_t>(blocks), ~uint64_t{0}, &order);
    for (const uint32_t number : order) {
        machine.block_number = number;
        machine.block = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
        run_block(shared_bytes);
    }
    current = nullptr;
    ++machine.launch;
    return true;
}

}  // namespace sim
}  // namespace dqk

#include "sim/language.h"
