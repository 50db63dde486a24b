// How a test in Python calls code on the simulator: a program reads requests on stdin and answers on stdout
// until stdin ends. harness.py is the other side. Every buffer is a heap allocation of exactly its size, so
// that ASan sees the first byte beyond it.
#pragma once
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include "cuda/launch.h"
#else  // host code alone (tests/long/test_cpu_gemm_arm.py): no schedules, no ASan
#include "dqk/status.h"
#define DQK_ASAN(call)
#endif

namespace dqk {
namespace sim {

#if !defined(__x86_64__)
inline void set_seed(uint64_t) {}
#endif

struct Buffer {
    char* memory = nullptr;  // on 256 bytes, like cudaMalloc's
    uint64_t bytes = 0;      // from `offset` on
    uint32_t offset = 0;
    uint32_t flags = 0;
};
constexpr uint32_t kGiven = 1, kWanted = 2, kNull = 4;

struct Request {
    uint64_t seed = 0;
    std::string function;
    std::vector<uint64_t> scalars;
    std::vector<Buffer> buffers;

    int64_t integer(size_t i) const { return static_cast<int64_t>(scalars.at(i)); }
    double real(size_t i) const {
        double value;
        std::memcpy(&value, &scalars.at(i), sizeof value);
        return value;
    }
    template <class T>
    T* pointer(size_t i) const {
        const Buffer& buffer = buffers.at(i);
        return buffer.memory == nullptr ? nullptr : reinterpret_cast<T*>(buffer.memory + buffer.offset);
    }
};

inline void read_all(void* to, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        const ssize_t got = ::read(0, static_cast<char*>(to) + done, bytes - done);
        if (got <= 0) std::exit(0);  // the tests are over
        done += static_cast<size_t>(got);
    }
}
template <class T>
T read_one() {
    T value;
    read_all(&value, sizeof value);
    return value;
}
inline void write_all(int file, const void* from, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        const ssize_t put = ::write(file, static_cast<const char*>(from) + done, bytes - done);
        if (put <= 0) std::exit(1);
        done += static_cast<size_t>(put);
    }
}

inline Buffer read_buffer() {
    Buffer buffer;
    buffer.bytes = read_one<uint64_t>();
    buffer.offset = read_one<uint32_t>();
    buffer.flags = read_one<uint32_t>();
    if ((buffer.flags & kNull) != 0) return buffer;
    const size_t whole = buffer.offset + buffer.bytes;
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, whole) != 0) std::abort();
    buffer.memory = static_cast<char*>(memory);
    std::memset(memory, 0xA5, whole);  // what is not written shows
    if ((buffer.flags & kGiven) != 0) read_all(buffer.memory + buffer.offset, buffer.bytes);
    DQK_ASAN(ASAN_POISON_MEMORY_REGION(memory, buffer.offset));
    return buffer;
}

// Answers each request with run()'s Status and the buffers that are wanted.
[[noreturn]] inline void serve(Status (*run)(const Request&)) {
    const int out = ::dup(1);
    ::dup2(2, 1);  // whatever prints must not end up in an answer
    for (;;) {
        Request request;
        request.seed = read_one<uint64_t>();
        set_seed(request.seed);
        request.function.resize(read_one<uint32_t>());
        read_all(&request.function[0], request.function.size());
        request.scalars.resize(read_one<uint32_t>());
        read_all(request.scalars.data(), 8 * request.scalars.size());
        request.buffers.resize(read_one<uint32_t>());
        for (Buffer& buffer : request.buffers) buffer = read_buffer();
        const auto status = static_cast<int32_t>(run(request));
        write_all(out, &status, sizeof status);
        for (const Buffer& buffer : request.buffers) {
            if ((buffer.flags & kWanted) != 0) write_all(out, buffer.memory + buffer.offset, buffer.bytes);
            DQK_ASAN(ASAN_UNPOISON_MEMORY_REGION(buffer.memory, buffer.offset));
            std::free(buffer.memory);
        }
    }
}

}  // namespace sim
}  // namespace dqk
