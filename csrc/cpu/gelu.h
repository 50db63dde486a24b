// GELU, the erf form, in fp32: plain multiplications and additions without a branch, so that a loop over it
// is vectorised for every instruction set and gives the same bits under each.
//
// t = |x| / sqrt(2). Up to 0.93 erf is a polynomial; above it erfc = exp(p(t)), with polynomials after N.
// Juffa (fitted for FMA, which rounds less often; docs/design.md bounds what is left). For x < 0, 1 + erf is
// erfc itself, so nothing cancels in the tail.
#pragma once
#include <cstdint>
#include <cstring>

#include "dqk/rounding.h"

namespace dqk {

// exp(r) for -88 < r <= 0.
DQK_HD float exp_nonpositive(float r) {
    const float n = (r * 1.44269504f + kMagic) - kMagic;
    const float f =
        (r - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first product exact
    float p = 1.37805939e-3f;
    p = p * f + 8.37312452e-3f;
    p = p * f + 4.16695364e-2f;
    p = p * f + 1.66664720e-1f;
    p = p * f + 4.99999851e-1f;
    p = p * f * f + f + 1.0f;
    const int32_t exponent = static_cast<int32_t>(float_bits(n + kMagic) - kMagicBits);
    return bits_float(float_bits(p) + (static_cast<uint32_t>(exponent) << 23));
}

// All ones where the sign bit is set, else 0.
DQK_HD uint32_t sign_mask(uint32_t bits) {
    return static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
}

// Masks, because a conditional expression on floats becomes a jump, and the loop is not vectorised.
DQK_HD float select(uint32_t mask, float a, float b) {
    return bits_float((float_bits(a) & mask) | (float_bits(b) & ~mask));
}

constexpr float kHalfRoot = 0.707106781f;  // 1 / sqrt(2)

// 1 + erf(a), up to |a| = 0.93.
DQK_HD float gelu_near(float a) {
    const float s = a * a;
    float near = -5.96761703e-4f;
    near = near * s + 4.99119423e-3f;
    near = near * s + -2.67681349e-2f;
    near = near * s + 1.12819925e-1f;
    near = near * s + -3.76125336e-1f;
    near = near * s + 1.28379166e-1f;
    return near * a + a + 1.0f;
}

// All ones where |a| < 4, given its bits: magnitudes order like them.
DQK_HD uint32_t gelu_below_4(uint32_t size) {
    return sign_mask(size - 0x40800000u);
}

// ln erfc(|a|), for |a| < 4.
DQK_HD float gelu_exponent(float a) {
    const uint32_t size = magnitude_bits(a);
    const float u = select(gelu_below_4(size), bits_float(size), 4.0f);
    const float v = u * u;
    float r = (-1.72853470e-5f * u + 3.83197126e-4f) * v + (-3.88396438e-3f * u + 2.42546219e-2f);
    r = r * u + -1.06777877e-1f;
    r = r * u + -6.34846687e-1f;
    r = r * u + -1.28717512e-1f;
    return r * u + -u;
}

// far: erfc(|a|) for |a| < 4.
DQK_HD float gelu_from(float x, float near, float far) {
    const uint32_t size = magnitude_bits(x * kHalfRoot);
    far = select(gelu_below_4(size), far, 0.0f);
    far = select(sign_mask(float_bits(x)), far, 2.0f - far);
    // 0x3F6D8000: 0.927734375
    return x * 0.5f * select(sign_mask(0x3F6D8000u - size), far, near);
}

// GELU of x[0..n), in place. Stage by stage over kGeluBlock elements: the whole of it is a chain of 40 steps,
// of which a processor sees too few side by side, and each stage is a loop that it sees many rounds of.
constexpr int64_t kGeluBlock = 64;

template <int64_t kCount>
__attribute__((always_inline)) inline void gelu_block(float* x) {
    float near[kCount], far[kCount];
    for (int64_t i = 0; i < kCount; ++i) near[i] = gelu_near(x[i] * kHalfRoot);
    for (int64_t i = 0; i < kCount; ++i) far[i] = gelu_exponent(x[i] * kHalfRoot);
    for (int64_t i = 0; i < kCount; ++i) far[i] = exp_nonpositive(far[i]);
    for (int64_t i = 0; i < kCount; ++i) x[i] = gelu_from(x[i], near[i], far[i]);
}

__attribute__((always_inline)) inline void gelu_of(float* x, int64_t n) {
    constexpr int64_t kHalf = kGeluBlock / 2;
    for (; n >= kGeluBlock; x += kGeluBlock, n -= kGeluBlock) gelu_block<kGeluBlock>(x);
    for (; n >= kHalf; x += kHalf, n -= kHalf) gelu_block<kHalf>(x);
    if (n <= 0) return;
    float rest[kHalf] = {};
    std::memcpy(rest, x, static_cast<size_t>(n) * sizeof(float));
    gelu_block<kHalf>(rest);
    std::memcpy(x, rest, static_cast<size_t>(n) * sizeof(float));
}

}  // namespace dqk
