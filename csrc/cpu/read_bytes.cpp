// A loop that does nothing but read: what a kernel that has to read the same bytes is held against.
#include <cstring>

#include "cpu/threads.h"
#include "dqk/api.h"

// The instruction set is a function attribute, not a flag of this file (quantize_x86.cpp says why).
#if defined(__x86_64__)
#define DQK_READ_AVX2 __attribute__((target("avx2")))
#endif

namespace dqk {
namespace {

constexpr int64_t kWords = 32;        // side by side: enough loads under way
constexpr int64_t kShare = 64 << 10;  // bytes of a task; the last one may be longer
constexpr int64_t kMaxTasks = 256;

// Sum of the 64-bit words, and of what is left, byte by byte.
#define DQK_SUM_OF_BYTES                                                                \
    uint64_t lane[kWords] = {};                                                         \
    int64_t i = 0;                                                                      \
    for (; i + 8 * kWords <= bytes; i += 8 * kWords)                                    \
        for (int64_t j = 0; j < kWords; ++j) {                                          \
            uint64_t word;                                                              \
            std::memcpy(&word, data + i + 8 * j, sizeof word);                          \
            lane[j] += word;                                                            \
        }                                                                               \
    uint64_t sum = 0;                                                                   \
    for (; i + 8 <= bytes; i += 8) {                                                    \
        uint64_t word;                                                                  \
        std::memcpy(&word, data + i, sizeof word);                                      \
        sum += word;                                                                    \
    }                                                                                   \
    for (; i < bytes; ++i) sum += static_cast<uint64_t>(static_cast<uint8_t>(data[i])); \
    for (const uint64_t one : lane) sum += one;                                         \
    return sum;

// clang-format off
uint64_t sum_plain(const char* data, int64_t bytes) {
    DQK_SUM_OF_BYTES
}
#if defined(__x86_64__)
DQK_READ_AVX2 uint64_t sum_avx2(const char* data, int64_t bytes) {
    DQK_SUM_OF_BYTES
}
#endif
// clang-format on

}  // namespace

Status read_bytes(const void* data, int64_t bytes, int32_t threads, uint64_t* sum) {
    if (bytes < 0) return Status::bad_size;
    Isa isa = Isa::scalar;
    const Status chosen = active_isa(&isa);
    if (chosen != Status::ok) return chosen;
    uint64_t (*read)(const char*, int64_t) = sum_plain;
#if defined(__x86_64__)
    if (isa != Isa::scalar) read = sum_avx2;
#endif
    int64_t tasks = bytes / kShare;
    tasks = tasks < 1 || threads <= 1 ? 1 : tasks > kMaxTasks ? kMaxTasks : tasks;
    const int64_t share = bytes / tasks / 8 * 8;
    uint64_t sums[kMaxTasks];
    parallel_for(tasks, threads, [&](int64_t task) {
        const int64_t start = task * share, end = task == tasks - 1 ? bytes : start + share;
        sums[task] = read(static_cast<const char*>(data) + start, end - start);
    });
    *sum = 0;
    for (int64_t task = 0; task < tasks; ++task) *sum += sums[task];
    return Status::ok;
}

}  // namespace dqk
