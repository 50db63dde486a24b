// The CPU GEMM for Arm with the dot product of bytes (Armv8.2's FEAT_DotProd): sdot on 128 bits.
//
// sdot takes signed bytes on both sides, so the weights stay signed and nothing has to come off the sums.
// Codes of 4 and 2 bits stand in the top bits of their byte: a shift or a mask then unpacks 16 of them, and
// the factor of 2^kShift is shifted out of the sums, which are multiples of it. With 8, 2, 3 and 127 as the
// largest level and activation, a sum is at most 2^7 * 127 * 131,071 < 2^31 before that.
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
#include "cpu/neon.h"
//
#include "cpu/gemm_table.h"

namespace dqk {
namespace {

template <int kUp>
DQK_TARGET inline uint8x16_t up(uint8x16_t v) {
    if constexpr (kUp == 0) {
        return v;
    } else {
        return vshlq_n_u8(v, kUp);
    }
}

// Codes scaled by 2^kShift: 8-bit ones by 1, 4-bit ones by 16, 2-bit ones by 64; a four_level code c, the
// level 2c + 1, by 32, which is the byte 64 c + 32.
template <int kShift>
struct DotSigned {
    using Vec = int8x16_t;
    using X = int8x16_t;
    using Sum = int32x4_t;
    using Partial = int32x4_t;
    static constexpr int64_t kCodes = 16, kGrain = 16, kXBytes = 1, kVecBytes = 16;
    static constexpr int64_t kSteps = int64_t{1} << 30;  // any number: drained once, for the shift
    static constexpr int kTokens = 4;
    static constexpr int32_t kOffset8 = 0, kMultiplierWord = 1;

    static DQK_TARGET inline Sum sum_zero() { return vdupq_n_s32(0); }
    static DQK_TARGET inline Partial zero() { return vdupq_n_s32(0); }
    static DQK_TARGET inline Vec splat(int32_t code) { return vdupq_n_s8(static_cast<int8_t>(code)); }
    static DQK_TARGET inline Vec load(const uint8_t* base, int64_t i) {
        return vreinterpretq_s8_u8(vld1q_u8(base + 16 * i));
    }
    static DQK_TARGET inline void store(Vec v, uint8_t* base, int64_t i) {
        vst1q_u8(base + 16 * i, vreinterpretq_u8_s8(v));
    }
    static DQK_TARGET inline void store_x(const int8_t* q, uint8_t* row, int64_t i) {
        store(vld1q_s8(q), row, i);
    }
    static DQK_TARGET inline X load_x(const uint8_t* row, int64_t i) { return load(row, i); }
    // Without an offset the sums of a group start from zero.
    static DQK_TARGET inline Partial load_partial(const uint8_t*, int64_t) { return zero(); }
    static DQK_TARGET inline void store_partial(Partial, uint8_t*, int64_t) {}
    static DQK_TARGET inline Partial negate(Partial p) { return p; }

    static DQK_TARGET inline Partial multiply(Partial p, Vec w, X x) { return vdotq_s32(p, w, x); }
    static DQK_TARGET inline Sum drain(Sum s, Partial p) {
        if constexpr (kShift == 0) {
            return vaddq_s32(s, p);
        } else {
            return vsraq_n_s32(s, p, kShift);
        }
    }
    template <int kGroup>
    static DQK_TARGET inline int32x4_t multipliers(const int32_t* words) {
        return vdupq_n_s32(*words);
    }
    static DQK_TARGET inline Sum drain_scaled(Sum s, Partial p, int32x4_t m) {
        return vmlaq_s32(s, drain(zero(), p), m);
    }

    static DQK_TARGET inline void pin(Partial& p) {
#if defined(__aarch64__)
        __asm__ volatile("" : "+w"(p));
#else
        static_cast<void>(p);
#endif
    }
    static DQK_TARGET inline int32x4_t reduced(const Sum (&s)[kGemmRows]) {
        return vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3]));
    }
    static DQK_TARGET inline void reduce(const Sum (&s)[kGemmRows], int32_t* acc) {
        vst1q_s32(acc, reduced(s));
    }
    static DQK_TARGET inline void add_reduced(const Sum (&s)[kGemmRows], int32_t* acc) {
        vst1q_s32(acc, vaddq_s32(vld1q_s32(acc), reduced(s)));
    }

    // The 128 codes of a block, in the order of k.
    template <typename F>
    static DQK_TARGET inline void unpack(const uint8_t* block, Vec (&u)[8]) {
        if constexpr (F::kBits == 8) {
            for (int j = 0; j < 8; ++j) u[j] = load(block, j);
        } else if constexpr (F::kBits == 4) {
            const uint8x16_t mask = vdupq_n_u8(0xF0);
            for (int j = 0; j < 4; ++j) {
                const uint8x16_t v = vld1q_u8(block + 16 * j);
                u[j] = vreinterpretq_s8_u8(up<4>(v));
                u[j + 4] = vreinterpretq_s8_u8(vandq_u8(v, mask));
            }
        } else {
            for (int j = 0; j < 2; ++j) {
                const uint8x16_t v = vld1q_u8(block + 16 * j);
                u[j] = top<F>(up<6>(v));
                u[j + 2] = top<F>(up<4>(v));
                u[j + 4] = top<F>(up<2>(v));
                u[j + 6] = top<F>(v);
            }
        }
    }

  private:
    // The two top bits of every byte, with half a step below them for four_level.
    template <typename F>
    static DQK_TARGET inline Vec top(uint8x16_t v) {
        const uint8x16_t mask = vdupq_n_u8(0xC0);
        if constexpr (F::kFactor == 1) {
            return vreinterpretq_s8_u8(vandq_u8(v, mask));
        } else {
            return vreinterpretq_s8_u8(vbslq_u8(mask, v, vdupq_n_u8(0x20)));
        }
    }
};

// Nothing to take off: see the head of the file.
template <>
constexpr int32_t offset_of<DotSigned<4>, W4>() {
    return 0;
}
template <>
constexpr int32_t offset_of<DotSigned<6>, W2>() {
    return 0;
}
template <>
constexpr int32_t offset_of<DotSigned<5>, W2F>() {
    return 0;
}

// Without panels: the loops of few rows serve many as well. four_level has a dot of its own, for its shift.
// The order is that of gemm_format().
constexpr GemmKernel dotprod_kernel() {
    using D8 = DotSigned<0>;
    using D4 = DotSigned<4>;
    using D2 = DotSigned<6>;
    using DF = DotSigned<5>;
    GemmKernel kernel = {
        "dotprod",
        {one_loops<D8, W8>(), one_loops<D4, W4>(), one_loops<D4, W4, 32>(), one_loops<D4, W4, 64>(),
         one_loops<D4, W4, 128>(), one_loops<D2, W2>(), one_loops<D2, W2, 32>(), one_loops<D2, W2, 64>(),
         one_loops<D2, W2, 128>(), one_loops<DF, W2F>(), one_loops<DF, W2F, 32>(), one_loops<DF, W2F, 64>(),
         one_loops<DF, W2F, 128>()},
        {few_loops<D8, W8>(), few_loops<D4, W4>(), few_loops<D4, W4, 32>(), few_loops<D4, W4, 64>(),
         few_loops<D4, W4, 128>(), few_loops<D2, W2>(), few_loops<D2, W2, 32>(), few_loops<D2, W2, 64>(),
         few_loops<D2, W2, 128>(), few_loops<DF, W2F>(), few_loops<DF, W2F, 32>(), few_loops<DF, W2F, 64>(),
         few_loops<DF, W2F, 128>()},
        {},
        ConvertNeon::widen,
        epilogue<ConvertNeon>,
        {embed<ConvertNeon, W8>, embed<ConvertNeon, W4>, embed<ConvertNeon, W2>, embed<ConvertNeon, W2F>}};
    for (int32_t i = 0; i < kGemmFormats; ++i) {
        kernel.many[i] = kernel.few[i];
        kernel.many[i].from_rows = INT64_MAX;
    }
    return kernel;
}

}  // namespace

const GemmKernel& dotprod_gemm() {
    static constexpr GemmKernel kernel = dotprod_kernel();
    return kernel;
}

}  // namespace dqk
#endif
