// What the sources for Arm share: its intrinsics, the attribute that lets a function use the dot product of
// bytes (FEAT_DotProd), and conversions. DQK_NEON_MODEL puts modelled instructions in their place
// (tests/sim), and the sources run on any machine.
//
// The instruction set is a function attribute, not a flag of a file (quantize_x86.cpp says why).
#pragma once
#include <cstring>

#include "dqk/element.h"

#if defined(DQK_NEON_MODEL)
#include "neon_model.h"
#define DQK_TARGET
#else
#include <arm_neon.h>
#if defined(__clang__)
#define DQK_TARGET __attribute__((target("dotprod")))
#else
#define DQK_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#endif

namespace dqk {
namespace {

// Elements i .. i + 3 of a row of floats.
template <DType kType>
DQK_TARGET inline float32x4_t load4(const void* x, int64_t i) {
    if constexpr (kType == DType::float32) {
        return vld1q_f32(static_cast<const float*>(x) + i);
    } else {
        const uint16x4_t raw = vld1_u16(static_cast<const uint16_t*>(x) + i);
        if constexpr (kType == DType::float16) {
            return vcvt_f32_f16(vreinterpret_f16_u16(raw));
        } else {
            return vreinterpretq_f32_u32(vshll_n_u16(raw, 16));
        }
    }
}

// fp32 to and from 16 bits, as element.h does it. FPCR's flush-to-zero bit of single precision does not reach
// half subnormals, and the rounding mode of a process is to nearest even, as for every other step.
struct ConvertNeon {
    static DQK_TARGET inline void widen(const void* from, DType dtype, int64_t count, float* to) {
        int64_t i = 0;
        if (dtype == DType::float32) {
            std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
            return;
        }
        for (; i + 4 <= count; i += 4)
            vst1q_f32(to + i, dtype == DType::float16 ? load4<DType::float16>(from, i)
                                                      : load4<DType::bfloat16>(from, i));
        for (; i < count; ++i) to[i] = load_element(from, dtype, i);
    }

    static DQK_TARGET inline void narrow(const float* from, int64_t count, void* to, DType dtype) {
        auto* halves = static_cast<uint16_t*>(to);
        int64_t i = 0;
        if (dtype == DType::float32) {
            std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
            return;
        }
        if (dtype == DType::float16)
            for (; i + 4 <= count; i += 4)
                vst1_u16(halves + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
        if (dtype == DType::bfloat16)
            for (; i + 4 <= count; i += 4) vst1_u16(halves + i, bfloat16(vld1q_f32(from + i)));
        for (; i < count; ++i) store_element(to, dtype, i, from[i]);
    }

  private:
    // Round half to even on the bits; a NaN becomes 0x7FC0.
    static DQK_TARGET inline uint16x4_t bfloat16(float32x4_t x) {
        const uint32x4_t bits = vreinterpretq_u32_f32(x);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t sum = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
        const uint32x4_t number = vceqq_f32(x, x);  // all ones, unless a NaN
        return vshrn_n_u32(vbslq_u32(number, sum, vdupq_n_u32(0x7FC00000u)), 16);
    }
};

}  // namespace
}  // namespace dqk
