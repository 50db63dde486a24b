// Sizes. Every product of sizes goes through here: a wrapped product is a small allocation and a large write.
#pragma once
#include <cstdint>
#include <limits>

namespace dqk {

// An int32 sum of K products of two int8 codes is exact up to here: 131071 * 128 * 128 < 2^31.
constexpr int64_t kMaxGemmK = 131071;
static_assert(kMaxGemmK * 128 * 128 <= std::numeric_limits<int32_t>::max(),
              "int32 accumulators must not wrap");

// An int32 row sum of K codes in -127..127.
constexpr int64_t kMaxRowSumK = std::numeric_limits<int32_t>::max() / 127;

// out = a * b for sizes (>= 0); false if it does not fit, and out is then untouched.
constexpr bool checked_mul(int64_t a, int64_t b, int64_t* out) {
    if (a < 0 || b < 0) return false;
    if (b != 0 && a > std::numeric_limits<int64_t>::max() / b) return false;
    *out = a * b;
    return true;
}

// out = a rounded up to a multiple of `to` (> 0); false if it does not fit.
constexpr bool checked_round_up(int64_t a, int64_t to, int64_t* out) {
    if (a < 0 || a > std::numeric_limits<int64_t>::max() - (to - 1)) return false;
    *out = (a + to - 1) / to * to;
    return true;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Tile loops may count in int32 when every element offset of the operand does.
constexpr bool fits_int32_index(int64_t rows, int64_t cols) {
    int64_t total = 0;
    return checked_mul(rows, cols, &total) && total <= std::numeric_limits<int32_t>::max();
}

}  // namespace dqk
