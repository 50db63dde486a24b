// The quantizer's two row loops for Arm, 8 elements a step. The operations and their order per element are
// those of quantize_one (rounding.h), so the bits are too; only integer sums and maxima are regrouped. They
// were run over modelled instructions (tests/sim/neon_model.h) and in an emulator, never on an Arm processor.
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
#include "cpu/neon.h"
//
#include "cpu/quantize_row.h"
#include "dqk/rounding.h"

namespace dqk {
namespace {

template <DType kType>
DQK_TARGET uint32_t neon_amax_bits(const void* x, int64_t k) {
    const uint32x4_t mask = vdupq_n_u32(0x7FFFFFFF);
    uint32x4_t low = vdupq_n_u32(0), high = low;
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        low = vmaxq_u32(low, vandq_u32(vreinterpretq_u32_f32(load4<kType>(x, i)), mask));
        high = vmaxq_u32(high, vandq_u32(vreinterpretq_u32_f32(load4<kType>(x, i + 4)), mask));
    }
    const auto* row = static_cast<const typename Element<kType>::type*>(x);
    uint32_t result = vmaxvq_u32(vmaxq_u32(low, high));
    for (; i < k; ++i) {
        const uint32_t bits = magnitude_bits(Element<kType>::widen(row[i]));
        result = bits > result ? bits : result;
    }
    return result;
}

DQK_TARGET inline float32x4_t clamp4(float32x4_t x, float32x4_t limit) {
    return vmaxq_f32(vminq_f32(x, limit), vnegq_f32(limit));
}

// Half to even is how the conversion rounds by itself.
DQK_TARGET inline int32x4_t codes4(float32x4_t x, float32x4_t inv, float32x4_t clip) {
    return vcvtnq_s32_f32(clamp4(vmulq_f32(clamp4(x, clip), inv), vdupq_n_f32(kQuantMax)));
}

template <DType kType>
DQK_TARGET int32_t neon_codes(const void* x, int64_t k, float inv, float clip, int8_t* q) {
    const float32x4_t inv4 = vdupq_n_f32(inv), clip4 = vdupq_n_f32(clip);
    int32x4_t sum4 = vdupq_n_s32(0);
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        const int32x4_t low = codes4(load4<kType>(x, i), inv4, clip4);
        const int32x4_t high = codes4(load4<kType>(x, i + 4), inv4, clip4);
        sum4 = vaddq_s32(sum4, vaddq_s32(low, high));
        vst1_s8(q + i, vmovn_s16(vcombine_s16(vmovn_s32(low), vmovn_s32(high))));
    }
    const auto* row = static_cast<const typename Element<kType>::type*>(x);
    int32_t sum = vaddvq_s32(sum4);
    for (; i < k; ++i) {
        const int32_t code = quantize_one(Element<kType>::widen(row[i]), inv, clip);
        q[i] = static_cast<int8_t>(code);
        sum += code;
    }
    return sum;
}

}  // namespace

RowFunctions neon_row_functions(DType dtype) {
    switch (dtype) {
        case DType::float16:
            return {neon_amax_bits<DType::float16>, neon_codes<DType::float16>};
        case DType::bfloat16:
            return {neon_amax_bits<DType::bfloat16>, neon_codes<DType::bfloat16>};
        default:
            return {neon_amax_bits<DType::float32>, neon_codes<DType::float32>};
    }
}

}  // namespace dqk
#endif
