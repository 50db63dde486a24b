// 127 e^x, what a key's share is rounded from: the same bits in every instruction set, for it is one order of
// IEEE products and sums, none of them fused.
//
// 2^n 127 2^f with n + f = x log2(e) and |f| <= 1/2. Where the code is not 0 (x > -5.6) the error is below
// 2^-21 of the value: the rounded product x log2(e) and its constant, the polynomial's 2^-23.2, two
// roundings. What two backends may differ by is 2^-20 (docs/design.md, "Attention").
#pragma once
#include <cstdint>
#include <cstring>

#include "dqk/rounding.h"

namespace dqk {

constexpr uint32_t kShareLowBits = 0x42AC0000;  // of 86: what is below -86 rounds to 0 as well
constexpr uint32_t kOneBits = 0x3F800000;       // of 1
constexpr float kLog2E = 1.44269504f;
constexpr int kShareTerms = 5;
// (127 2^f - 127) / f; with 127 itself exact, so that the largest share is 127.
constexpr float kShareTerm[kShareTerms] = {0x1.5902a0p-3f, 0x1.3a70b2p+0f, 0x1.c329e4p+2f, 0x1.e821c8p+4f,
                                           0x1.601e60p+6f};

// For -86 <= x <= 0.
DQK_HD float share_of(float x) {
    const float t = x * kLog2E, shifted = t + kMagic;
    const float f = t - (shifted - kMagic);
    float p = kShareTerm[0];
    for (int i = 1; i < kShareTerms; ++i) p = p * f + kShareTerm[i];
    p = p * f + kQuantMax;
    // The low bits of `shifted` are n; those of the magic number leave the word at its top.
    static_assert((kMagicBits << 23) == 0, "n alone is left by the shift");
    return bits_float(float_bits(p) + (float_bits(shifted) << 23));
}

// Of two floats that are not negative, given by their bits, the smaller; of a NaN and a number the number.
// Integers, because a comparison of floats becomes a jump, and a loop over it is not vectorised.
DQK_HD float smaller(uint32_t bits, uint32_t other) {
    return bits_float(bits < other ? bits : other);
}

// c[j] = round(t min(1, v_scale[j] v_inv)) with t = 127 exp(s - shift), where s <= shift is the float in
// work[j]; returns the sum of round(t). Plain C++, to be vectorised with the attribute of the function that
// it is inlined into.
//
// The scale of a hidden key may be a NaN: its t is 0, and so is its share of anything.
__attribute__((always_inline)) inline int32_t shares_of(const int32_t* work, int64_t count, float shift,
                                                        const float* v_scale, float v_inv,
                                                        uint8_t* __restrict c) {
    uint32_t weight = 0;
    for (int64_t j = 0; j < count; ++j) {
        const float below = bits_float(static_cast<uint32_t>(work[j])) - shift;
        const float t = share_of(-smaller(magnitude_bits(below), kShareLowBits));
        const float ratio = smaller(float_bits(v_scale[j] * v_inv), kOneBits);
        weight += float_bits(t + kMagic);  // whose low bits are the integer; the others come off at the end
        c[j] = static_cast<uint8_t>(float_bits(t * ratio + kMagic));
    }
    return static_cast<int32_t>(weight - static_cast<uint32_t>(count) * kMagicBits);
}

}  // namespace dqk
