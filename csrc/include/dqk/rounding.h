// The float arithmetic of the quantizer, once, for host and device (docs/design.md, section 3).
//
// Every step is one IEEE single-precision operation. The host is compiled with -ffp-contract=off and the
// device names its rounding, so that nothing is fused and all backends return the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define DQK_HD __host__ __device__ __forceinline__
#else
#define DQK_HD inline __attribute__((always_inline))
#endif

namespace dqk {

constexpr float kQuantMax = 127.0f;              // codes are -127..127; -128 is never produced
constexpr uint32_t kInfBits = 0x7F800000u;       // magnitudes from here on are Inf or NaN
constexpr uint32_t kTinyBits = 0x0D800000u;      // 2^-100: rows below count as zero, so 127 / amax is finite
constexpr uint32_t kMinScaleBits = 0x00800000u;  // 2^-126
constexpr uint32_t kMaxScaleBits = 0x7E800000u;  // 2^126
constexpr float kNoClip = std::numeric_limits<float>::max();

// Adding 1.5 * 2^23 leaves no fraction bits, so the adder itself rounds half to even, and the integer stands
// in the low bits in two's complement. Right for |x| < 2^22; callers clamp to 127 first.
constexpr float kMagic = 12582912.0f;
constexpr uint32_t kMagicBits = 0x4B400000u;

DQK_HD uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
DQK_HD float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

DQK_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
DQK_HD float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}
DQK_HD float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

DQK_HD float sqrt_rn(float a) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(a);
#else
    return std::sqrt(a);
#endif
}

// |x| as an integer that orders like the magnitude, with Inf and NaN on top: float max would drop a NaN.
DQK_HD uint32_t magnitude_bits(float x) {
    return float_bits(x) & 0x7FFFFFFFu;
}

// 16-bit inputs widen exactly. Integer steps, so that flush-to-zero modes cannot touch half subnormals.
DQK_HD float half_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
    float wide;  // one instruction, exact as well
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(h));
    return wide;
#else
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t mag = h & 0x7FFFu;
    if (mag >= 0x7C00u) return bits_float(sign | kInfBits | ((mag & 0x3FFu) << 13));
    if (mag >= 0x0400u) return bits_float(sign | ((mag << 13) + (112u << 23)));
    return bits_float(sign |
                      float_bits(mul_rn(static_cast<float>(mag), 5.9604644775390625e-8f)));  // mag * 2^-24
#endif
}
DQK_HD float bfloat16_to_float(uint16_t b) {
    return bits_float(static_cast<uint32_t>(b) << 16);
}

// Round half to even; beyond the largest half comes Inf, and a NaN stays one.
DQK_HD uint16_t float_to_half(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
#else
    const uint32_t bits = float_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t mag = bits & 0x7FFFFFFFu;
    if (mag >= 0x47800000u) return static_cast<uint16_t>(sign | (mag > kInfBits ? 0x7E00u : 0x7C00u));
    // Below 2^-14 the adder rounds: next to 0.5 an ulp is 2^-24, the step of half subnormals.
    if (mag < 0x38800000u)
        return static_cast<uint16_t>(sign | (float_bits(add_rn(bits_float(mag), 0.5f)) - 0x3F000000u));
    mag += 0xFFFu + ((mag >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((mag - (112u << 23)) >> 13));
#endif
}
DQK_HD uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7FFFFFFFu) > kInfBits) return 0x7FC0u;
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// What one row is quantized with. inv == 0: all codes are 0 (scale 1: a zero row; NaN: a non-finite row).
struct RowScale {
    float inv;
    float scale;
};

DQK_HD bool non_finite(uint32_t amax_bits) {
    return amax_bits >= kInfBits;
}
DQK_HD RowScale nan_row() {
    return RowScale{0.0f, bits_float(0x7FC00000u)};
}

// per_token and per_tensor, from the raw row's largest magnitude. Finite or not is judged before the clip.
DQK_HD RowScale dynamic_scale(uint32_t amax_bits, float clip) {
    if (non_finite(amax_bits)) return nan_row();
    const uint32_t clip_bits = float_bits(clip);
    if (amax_bits > clip_bits) amax_bits = clip_bits;
    if (amax_bits < kTinyBits) return RowScale{0.0f, 1.0f};
    const float amax = bits_float(amax_bits);
    return RowScale{div_rn(kQuantMax, amax), div_rn(amax, kQuantMax)};
}

// static: the calibrated scale, unless the row is not finite.
DQK_HD RowScale static_scale(uint32_t amax_bits, float act_scale) {
    if (non_finite(amax_bits)) return nan_row();
    return RowScale{div_rn(1.0f, act_scale), act_scale};
}

DQK_HD float clamp(float x, float limit) {
    x = x > limit ? limit : x;
    return x < -limit ? -limit : x;
}

// round_half_even(clamp(clip(x) * inv, -127, 127)), for finite x.
DQK_HD int32_t quantize_one(float x, float inv, float clip) {
    const float t = clamp(mul_rn(clamp(x, clip), inv), kQuantMax);
    return static_cast<int32_t>(float_bits(add_rn(t, kMagic)) - kMagicBits);
}

}  // namespace dqk
