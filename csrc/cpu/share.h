// 127 e^x, what a key's share is rounded from: the same bits in every instruction set, for it is one order of
// IEEE products and sums, none of them fused.
//
// 2^n 127 2^f with n + f = x log2(e) and |f| <= 1/2. Where the code is not 0 (x > -5.6) the error is below
// 2^-21 of the value: the rounded product x log2(e) and its constant, the polynomial's 2^-23.2, two
// roundings. What two backends may differ by is 2^-20 (docs/design.md, "Attention").
#pragma once
#include "dqk/rounding.h"

namespace dqk {

constexpr float kShareLow = -86.0f;  // callers clamp to it: what is below rounds to 0 as well
constexpr float kLog2E = 1.44269504f;
constexpr int kShareTerms = 5;
// (127 2^f - 127) / f; with 127 itself exact, so that the largest share is 127.
constexpr float kShareTerm[kShareTerms] = {0x1.5902a0p-3f, 0x1.3a70b2p+0f, 0x1.c329e4p+2f, 0x1.e821c8p+4f,
                                           0x1.601e60p+6f};

// For kShareLow <= x <= 0.
inline float share_of(float x) {
    const float t = x * kLog2E, shifted = t + kMagic;
    const float f = t - (shifted - kMagic);
    float p = kShareTerm[0];
    for (int i = 1; i < kShareTerms; ++i) p = p * f + kShareTerm[i];
    p = p * f + kQuantMax;
    // The low bits of `shifted` are n; those of the magic number leave the word at its top.
    static_assert((kMagicBits << 23) == 0, "n alone is left by the shift");
    return bits_float(float_bits(p) + (float_bits(shifted) << 23));
}

}  // namespace dqk
