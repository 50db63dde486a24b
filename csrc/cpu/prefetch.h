// Asking for memory before it is needed. A request is never a fault, whatever stands at its address.
#pragma once
#include <cstdint>

namespace dqk {

constexpr int64_t kLineBytes = 64;

// Keys ahead of the loops over rows in a cache, which is larger than what stays near between two steps, and
// whose heads are too short for the hardware to run ahead of.
constexpr int64_t kKeysAhead = 16;

inline void ask_for(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += kLineBytes)
        __builtin_prefetch(static_cast<const char*>(from) + at);
}

}  // namespace dqk
