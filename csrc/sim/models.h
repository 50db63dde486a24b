// What each GPU primitive of cuda/primitives.cuh does, as a pure function over the registers of 32 lanes. The
// simulator computes with these; tests/cuda/primitives.cu compares them with the instructions on a real GPU.
// Plain C++17: no CUDA, no simulator. Fragment layouts: PTX ISA, "Warp-level matrix instructions".
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace dqk {
namespace sim {

constexpr int32_t kLanes = 32;

// The one model that is hot: its indices are constants within its own arrays, and checking them takes ten
// times as long as computing.
#if defined(__clang__) || defined(__GNUC__)
#define DQK_UNCHECKED __attribute__((no_sanitize("address"), no_sanitize("undefined")))
#else
#define DQK_UNCHECKED
#endif

inline int32_t byte_of(uint32_t word, int32_t i) {
    return static_cast<int8_t>(static_cast<uint8_t>(word >> (8 * i)));
}
inline int32_t wrapped(int64_t x) {
    return static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint64_t>(x)));
}

// mma.m16n8k32 s8: c += a . b, wrapping. Lane 4g + t holds of A (16 x 32) rows g and g + 8, k = 4t.. and
// 16 + 4t..; of B (32 x 8) column g, the same k; of C (16 x 8) rows g and g + 8, columns 2t and 2t + 1.
DQK_UNCHECKED inline void mma_m16n8k32_model(int32_t c[kLanes][4], const uint32_t a[kLanes][4],
                                             const uint32_t b[kLanes][2]) {
    int8_t rows[16][32], columns[8][32];
    for (int32_t lane = 0; lane < kLanes; ++lane) {
        const int32_t g = lane / 4, t = lane % 4;
        for (int32_t r = 0; r < 4; ++r) std::memcpy(&rows[g + r % 2 * 8][r / 2 * 16 + 4 * t], &a[lane][r], 4);
        for (int32_t r = 0; r < 2; ++r) std::memcpy(&columns[g][r * 16 + 4 * t], &b[lane][r], 4);
    }
    for (int32_t lane = 0; lane < kLanes; ++lane)
        for (int32_t i = 0; i < 4; ++i) {
            const int8_t* row = rows[lane / 4 + i / 2 * 8];
            const int8_t* column = columns[lane % 4 * 2 + i % 2];
            int32_t sum = 0;  // 32 products of at most 2^14
            for (int32_t k = 0; k < 32; ++k) sum += static_cast<int32_t>(row[k]) * column[k];
            c[lane][i] = wrapped(int64_t{c[lane][i]} + sum);
        }
}

// ldmatrix.x4.b16: lane 8i + j names row j (16 bytes) of matrix i; lane 4g + t gets bytes 4t.. of row g of
// each.
inline void ldmatrix_x4_model(uint32_t r[kLanes][4], const void* const rows[kLanes]) {
    for (int32_t lane = 0; lane < kLanes; ++lane)
        for (int32_t i = 0; i < 4; ++i)
            std::memcpy(&r[lane][i], static_cast<const char*>(rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
}

// dp4a.s32.s32: four signed bytes by four signed bytes, added to c, wrapping.
inline int32_t dot4_model(uint32_t a, uint32_t b, int32_t c) {
    int64_t sum = c;
    for (int32_t i = 0; i < 4; ++i) sum += byte_of(a, i) * byte_of(b, i);
    return wrapped(sum);
}

// prmt.b32 with selectors below 8.
inline uint32_t permute_bytes_model(uint32_t a, uint32_t b, uint32_t s) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (uint32_t i = 0; i < 4; ++i)
        result |= static_cast<uint32_t>(bytes >> (8 * (s >> (4 * i) & 7u)) & 0xFFu) << (8 * i);
    return result;
}

inline int32_t count_bits_model(uint32_t bits) {
    int32_t count = 0;
    for (; bits != 0; bits &= bits - 1) ++count;
    return count;
}

// ex2.approx.ftz: the instruction errs by up to 2^-22 of the result, which this does not imitate.
inline float exp2_approx_model(float x) {
    const float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;  // a NaN stays one
}

// cp.async.cg 16 with a source size: `bytes` (0..16) are read, the rest is zero.
inline void copy_async16_model(void* to, const void* from, int32_t bytes) {
    std::memset(to, 0, 16);
    if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

// shfl.sync: the lane whose value `lane` gets. `width`: 1, 2, 4 .. 32. A source outside the segment: its own.
enum class Shuffle : int32_t { idx, up, down, exclusive_or };
inline int32_t shuffle_source(Shuffle kind, int32_t lane, int32_t operand, int32_t width) {
    const int32_t first = lane & ~(width - 1), last = first | (width - 1), b = operand & (kLanes - 1);
    switch (kind) {
        case Shuffle::idx:
            return first | (b & (width - 1));
        case Shuffle::up:
            return lane - b >= first ? lane - b : lane;
        case Shuffle::down:
            return lane + b <= last ? lane + b : lane;
        default:
            return (lane ^ b) <= last ? lane ^ b : lane;  // earlier segments can be read
    }
}

// vote.sync.ballot: bit i = lane i takes part and its predicate holds.
inline uint32_t ballot_model(const bool predicate[kLanes], uint32_t mask) {
    uint32_t bits = 0;
    for (int32_t lane = 0; lane < kLanes; ++lane)
        if ((mask >> lane & 1u) != 0 && predicate[lane]) bits |= 1u << lane;
    return bits;
}

// atom.inc: counts 0 .. last, then starts again.
inline uint32_t increment_model(uint32_t old, uint32_t last) {
    return old >= last ? 0 : old + 1;
}

}  // namespace sim
}  // namespace dqk
