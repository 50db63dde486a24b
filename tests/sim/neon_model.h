// The NEON intrinsics that the sources for Arm in csrc/cpu use, lane by lane in plain C++ after Arm's
// description of each instruction: the real sources then run on any machine. Lanes wrap, as there; vcvt
// rounds as rounding.h does, which the conversion tests hold to IEEE.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "dqk/rounding.h"

namespace dqk {

template <typename T, int kLanes>
struct NeonModel {
    T lane[kLanes];
};
using int8x16_t = NeonModel<int8_t, 16>;
using uint8x16_t = NeonModel<uint8_t, 16>;
using int32x4_t = NeonModel<int32_t, 4>;
using uint32x4_t = NeonModel<uint32_t, 4>;
using float32x4_t = NeonModel<float, 4>;
using uint16x4_t = NeonModel<uint16_t, 4>;
using int8x8_t = NeonModel<int8_t, 8>;
using uint8x8_t = NeonModel<uint8_t, 8>;
using int16x4_t = NeonModel<int16_t, 4>;
using int16x8_t = NeonModel<int16_t, 8>;
using float32x2_t = NeonModel<float, 2>;
using float64x2_t = NeonModel<double, 2>;
struct int8x8x4_t {
    int8x8_t val[4];
};
struct float16x4_t {
    uint16_t lane[4];
};

namespace neon_model {

template <typename V, typename T>
V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <typename To, typename From>
To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a register is a register");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
template <typename V, typename T>
V splat(T value) {
    V v;
    for (auto& lane : v.lane) lane = value;
    return v;
}
// f(lane of a, lane of b, ...) in every lane of a register of its own.
template <typename To, typename F, typename V, typename... More>
To each(F f, const V& a, const More&... more) {
    To to;
    static_assert(sizeof to.lane / sizeof *to.lane == sizeof a.lane / sizeof *a.lane, "as many lanes");
    for (size_t i = 0; i < sizeof a.lane / sizeof *a.lane; ++i) to.lane[i] = f(a.lane[i], more.lane[i]...);
    return to;
}
// Half a register: the lanes from `first` on.
template <typename To, typename V>
To part(const V& v, int first) {
    To to;
    for (size_t i = 0; i < sizeof to.lane / sizeof *to.lane; ++i) to.lane[i] = v.lane[first + i];
    return to;
}
template <typename V>
V zip(const V& a, const V& b, int first) {
    V v;
    constexpr int kLanes = sizeof v.lane / sizeof *v.lane;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = (i % 2 == 0 ? a : b).lane[first + i / 2];
    return v;
}
inline int32_t add(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
inline int32_t times(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
}

}  // namespace neon_model

inline int8x16_t vld1q_s8(const int8_t* p) {
    return neon_model::load<int8x16_t>(p);
}
inline uint8x16_t vld1q_u8(const uint8_t* p) {
    return neon_model::load<uint8x16_t>(p);
}
inline int32x4_t vld1q_s32(const int32_t* p) {
    return neon_model::load<int32x4_t>(p);
}
inline float32x4_t vld1q_f32(const float* p) {
    return neon_model::load<float32x4_t>(p);
}
inline uint16x4_t vld1_u16(const uint16_t* p) {
    return neon_model::load<uint16x4_t>(p);
}
inline void vst1q_u8(uint8_t* p, uint8x16_t v) {
    std::memcpy(p, &v, sizeof v);
}
inline void vst1q_s32(int32_t* p, int32x4_t v) {
    std::memcpy(p, &v, sizeof v);
}
inline void vst1q_f32(float* p, float32x4_t v) {
    std::memcpy(p, &v, sizeof v);
}
inline void vst1_u16(uint16_t* p, uint16x4_t v) {
    std::memcpy(p, &v, sizeof v);
}

inline int8x16_t vdupq_n_s8(int8_t x) {
    return neon_model::splat<int8x16_t>(x);
}
inline uint8x16_t vdupq_n_u8(uint8_t x) {
    return neon_model::splat<uint8x16_t>(x);
}
inline int32x4_t vdupq_n_s32(int32_t x) {
    return neon_model::splat<int32x4_t>(x);
}
inline uint32x4_t vdupq_n_u32(uint32_t x) {
    return neon_model::splat<uint32x4_t>(x);
}

inline int8x16_t vreinterpretq_s8_u8(uint8x16_t v) {
    return neon_model::bits<int8x16_t>(v);
}
inline uint8x16_t vreinterpretq_u8_s8(int8x16_t v) {
    return neon_model::bits<uint8x16_t>(v);
}
inline float32x4_t vreinterpretq_f32_u32(uint32x4_t v) {
    return neon_model::bits<float32x4_t>(v);
}
inline uint32x4_t vreinterpretq_u32_f32(float32x4_t v) {
    return neon_model::bits<uint32x4_t>(v);
}
inline float16x4_t vreinterpret_f16_u16(uint16x4_t v) {
    return neon_model::bits<float16x4_t>(v);
}
inline uint16x4_t vreinterpret_u16_f16(float16x4_t v) {
    return neon_model::bits<uint16x4_t>(v);
}

// SDOT: four products of signed bytes onto each word.
inline int32x4_t vdotq_s32(int32x4_t sum, int8x16_t a, int8x16_t b) {
    for (int i = 0; i < 4; ++i)
        for (int j = 4 * i; j < 4 * i + 4; ++j)
            sum.lane[i] = neon_model::add(sum.lane[i], a.lane[j] * b.lane[j]);
    return sum;
}
inline int32x4_t vaddq_s32(int32x4_t a, int32x4_t b) {
    for (int i = 0; i < 4; ++i) a.lane[i] = neon_model::add(a.lane[i], b.lane[i]);
    return a;
}
inline int32x4_t vmlaq_s32(int32x4_t sum, int32x4_t a, int32x4_t b) {
    for (int i = 0; i < 4; ++i)
        sum.lane[i] = neon_model::add(sum.lane[i], neon_model::times(a.lane[i], b.lane[i]));
    return sum;
}
// SSRA: an arithmetic shift, towards minus infinity, then the sum.
inline int32x4_t vsraq_n_s32(int32x4_t sum, int32x4_t a, int shift) {
    for (int i = 0; i < 4; ++i) sum.lane[i] = neon_model::add(sum.lane[i], a.lane[i] >> shift);
    return sum;
}
// ADDP: neighbours of a, then those of b.
inline int32x4_t vpaddq_s32(int32x4_t a, int32x4_t b) {
    return {{neon_model::add(a.lane[0], a.lane[1]), neon_model::add(a.lane[2], a.lane[3]),
             neon_model::add(b.lane[0], b.lane[1]), neon_model::add(b.lane[2], b.lane[3])}};
}
inline uint32x4_t vaddq_u32(uint32x4_t a, uint32x4_t b) {
    for (int i = 0; i < 4; ++i) a.lane[i] += b.lane[i];
    return a;
}
inline uint32x4_t vandq_u32(uint32x4_t a, uint32x4_t b) {
    for (int i = 0; i < 4; ++i) a.lane[i] &= b.lane[i];
    return a;
}
inline uint8x16_t vandq_u8(uint8x16_t a, uint8x16_t b) {
    for (int i = 0; i < 16; ++i) a.lane[i] &= b.lane[i];
    return a;
}
// BSL: bits of a where the mask has ones, else of b.
inline uint8x16_t vbslq_u8(uint8x16_t mask, uint8x16_t a, uint8x16_t b) {
    for (int i = 0; i < 16; ++i)
        a.lane[i] = static_cast<uint8_t>((a.lane[i] & mask.lane[i]) | (b.lane[i] & ~mask.lane[i]));
    return a;
}
inline uint32x4_t vbslq_u32(uint32x4_t mask, uint32x4_t a, uint32x4_t b) {
    for (int i = 0; i < 4; ++i) a.lane[i] = (a.lane[i] & mask.lane[i]) | (b.lane[i] & ~mask.lane[i]);
    return a;
}
inline uint8x16_t vshlq_n_u8(uint8x16_t a, int shift) {
    for (auto& lane : a.lane) lane = static_cast<uint8_t>(lane << shift);
    return a;
}
inline uint32x4_t vshrq_n_u32(uint32x4_t a, int shift) {
    for (auto& lane : a.lane) lane >>= shift;
    return a;
}
inline uint32x4_t vshll_n_u16(uint16x4_t a, int shift) {
    uint32x4_t wide;
    for (int i = 0; i < 4; ++i) wide.lane[i] = static_cast<uint32_t>(a.lane[i]) << shift;
    return wide;
}
inline uint16x4_t vshrn_n_u32(uint32x4_t a, int shift) {
    uint16x4_t narrow;
    for (int i = 0; i < 4; ++i) narrow.lane[i] = static_cast<uint16_t>(a.lane[i] >> shift);
    return narrow;
}
inline uint32x4_t vceqq_f32(float32x4_t a, float32x4_t b) {
    uint32x4_t equal;
    for (int i = 0; i < 4; ++i) equal.lane[i] = a.lane[i] == b.lane[i] ? ~0u : 0u;
    return equal;
}
inline float32x4_t vcvt_f32_f16(float16x4_t a) {
    float32x4_t wide;
    for (int i = 0; i < 4; ++i) wide.lane[i] = half_to_float(a.lane[i]);
    return wide;
}
inline float16x4_t vcvt_f16_f32(float32x4_t a) {
    float16x4_t narrow;
    for (int i = 0; i < 4; ++i) narrow.lane[i] = float_to_half(a.lane[i]);
    return narrow;
}

// ---- attention, the quantizer of rows, norms -------------------------------------------------------------

inline int8x8_t vld1_s8(const int8_t* p) {
    return neon_model::load<int8x8_t>(p);
}
inline uint8x8_t vld1_u8(const uint8_t* p) {
    return neon_model::load<uint8x8_t>(p);
}
inline void vst1_s8(int8_t* p, int8x8_t v) {
    std::memcpy(p, &v, sizeof v);
}
inline void vst1_u8(uint8_t* p, uint8x8_t v) {
    std::memcpy(p, &v, sizeof v);
}
inline void vst1q_s8(int8_t* p, int8x16_t v) {
    std::memcpy(p, &v, sizeof v);
}
inline void vst1q_f64(double* p, float64x2_t v) {
    std::memcpy(p, &v, sizeof v);
}
// ST4: lane 0 of each of the four, then lane 1 of each.
inline void vst4_s8(int8_t* p, int8x8x4_t v) {
    for (int i = 0; i < 32; ++i) p[i] = v.val[i % 4].lane[i / 4];
}

inline int16x8_t vdupq_n_s16(int16_t x) {
    return neon_model::splat<int16x8_t>(x);
}
inline float32x4_t vdupq_n_f32(float x) {
    return neon_model::splat<float32x4_t>(x);
}
inline float64x2_t vdupq_n_f64(double x) {
    return neon_model::splat<float64x2_t>(x);
}

inline int32x4_t vreinterpretq_s32_s8(int8x16_t v) {
    return neon_model::bits<int32x4_t>(v);
}
inline int8x16_t vreinterpretq_s8_s32(int32x4_t v) {
    return neon_model::bits<int8x16_t>(v);
}
inline int32x4_t vreinterpretq_s32_f32(float32x4_t v) {
    return neon_model::bits<int32x4_t>(v);
}
inline float32x4_t vreinterpretq_f32_s32(int32x4_t v) {
    return neon_model::bits<float32x4_t>(v);
}
inline uint32x4_t vreinterpretq_u32_s32(int32x4_t v) {
    return neon_model::bits<uint32x4_t>(v);
}
inline int8x8_t vreinterpret_s8_u8(uint8x8_t v) {
    return neon_model::bits<int8x8_t>(v);
}
inline uint8x8_t vreinterpret_u8_s8(int8x8_t v) {
    return neon_model::bits<uint8x8_t>(v);
}

inline int8x8_t vget_low_s8(int8x16_t v) {
    return neon_model::part<int8x8_t>(v, 0);
}
inline int8x8_t vget_high_s8(int8x16_t v) {
    return neon_model::part<int8x8_t>(v, 8);
}
inline int16x4_t vget_low_s16(int16x8_t v) {
    return neon_model::part<int16x4_t>(v, 0);
}
inline int16x4_t vget_high_s16(int16x8_t v) {
    return neon_model::part<int16x4_t>(v, 4);
}
inline float32x2_t vget_low_f32(float32x4_t v) {
    return neon_model::part<float32x2_t>(v, 0);
}
inline int16x8_t vcombine_s16(int16x4_t low, int16x4_t high) {
    return neon_model::bits<int16x8_t>(NeonModel<int16x4_t, 2>{{low, high}});
}
inline int32x4_t vzip1q_s32(int32x4_t a, int32x4_t b) {
    return neon_model::zip(a, b, 0);
}
inline int32x4_t vzip2q_s32(int32x4_t a, int32x4_t b) {
    return neon_model::zip(a, b, 2);
}

// SDOT by element: the four bytes of one word of b, for every word.
inline int32x4_t vdotq_laneq_s32(int32x4_t sum, int8x16_t a, int8x16_t b, int word) {
    return vdotq_s32(sum, a, vreinterpretq_s8_s32(vdupq_n_s32(vreinterpretq_s32_s8(b).lane[word])));
}
// SMLAL, SMLAL2: products of 16 bits, whose sums wrap.
inline int16x8_t vmlal_s8(int16x8_t sum, int8x8_t a, int8x8_t b) {
    const auto f = [](int16_t s, int8_t x, int8_t y) { return static_cast<int16_t>(s + x * y); };
    return neon_model::each<int16x8_t>(f, sum, a, b);
}
inline int16x8_t vmlal_high_s8(int16x8_t sum, int8x16_t a, int8x16_t b) {
    return vmlal_s8(sum, vget_high_s8(a), vget_high_s8(b));
}
// SADDW, SADDW2.
inline int32x4_t vaddw_s16(int32x4_t a, int16x4_t b) {
    return neon_model::each<int32x4_t>([](int32_t x, int16_t y) { return neon_model::add(x, y); }, a, b);
}
inline int32x4_t vaddw_high_s16(int32x4_t a, int16x8_t b) {
    return vaddw_s16(a, vget_high_s16(b));
}
inline int32_t vaddvq_s32(int32x4_t v) {
    int32_t sum = 0;
    for (const int32_t lane : v.lane) sum = neon_model::add(sum, lane);
    return sum;
}
// SXTL; XTN, which drops the high half.
inline int16x8_t vmovl_s8(int8x8_t v) {
    return neon_model::each<int16x8_t>([](int8_t x) { return static_cast<int16_t>(x); }, v);
}
inline int32x4_t vmovl_s16(int16x4_t v) {
    return neon_model::each<int32x4_t>([](int16_t x) { return static_cast<int32_t>(x); }, v);
}
inline int16x4_t vmovn_s32(int32x4_t v) {
    return neon_model::each<int16x4_t>([](int32_t x) { return static_cast<int16_t>(x); }, v);
}
inline int8x8_t vmovn_s16(int16x8_t v) {
    return neon_model::each<int8x8_t>([](int16_t x) { return static_cast<int8_t>(x); }, v);
}
// CMTST: all ones where a and b share a bit.
inline uint8x8_t vtst_u8(uint8x8_t a, uint8x8_t b) {
    const auto f = [](uint8_t x, uint8_t y) { return static_cast<uint8_t>((x & y) != 0 ? 0xFF : 0); };
    return neon_model::each<uint8x8_t>(f, a, b);
}
inline uint32x4_t vshlq_n_u32(uint32x4_t a, int shift) {
    for (auto& lane : a.lane) lane <<= shift;
    return a;
}
inline uint32x4_t vmaxq_u32(uint32x4_t a, uint32x4_t b) {
    return neon_model::each<uint32x4_t>([](uint32_t x, uint32_t y) { return x > y ? x : y; }, a, b);
}
inline uint32_t vmaxvq_u32(uint32x4_t v) {
    return *std::max_element(v.lane, v.lane + 4);
}
inline uint32_t vminvq_u32(uint32x4_t v) {
    return *std::min_element(v.lane, v.lane + 4);
}
inline float32x4_t vbslq_f32(uint32x4_t mask, float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_u32(vbslq_u32(mask, vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}

inline float32x4_t vaddq_f32(float32x4_t a, float32x4_t b) {
    return neon_model::each<float32x4_t>([](float x, float y) { return x + y; }, a, b);
}
inline float32x4_t vsubq_f32(float32x4_t a, float32x4_t b) {
    return neon_model::each<float32x4_t>([](float x, float y) { return x - y; }, a, b);
}
inline float32x4_t vmulq_f32(float32x4_t a, float32x4_t b) {
    return neon_model::each<float32x4_t>([](float x, float y) { return x * y; }, a, b);
}
inline float32x4_t vdivq_f32(float32x4_t a, float32x4_t b) {
    return neon_model::each<float32x4_t>([](float x, float y) { return x / y; }, a, b);
}
inline float32x4_t vnegq_f32(float32x4_t a) {
    return neon_model::each<float32x4_t>([](float x) { return -x; }, a);
}
// FMAX, FMIN: NaN where either is one. -0 is below +0.
inline float32x4_t vmaxq_f32(float32x4_t a, float32x4_t b) {
    const auto f = [](float x, float y) {
        return x != x || y != y ? x + y : x > y || (x == y && std::signbit(y)) ? x : y;
    };
    return neon_model::each<float32x4_t>(f, a, b);
}
inline float32x4_t vminq_f32(float32x4_t a, float32x4_t b) {
    return vnegq_f32(vmaxq_f32(vnegq_f32(a), vnegq_f32(b)));
}
// FMAXNM, FMINNM: the number beside a quiet NaN.
inline float32x4_t vmaxnmq_f32(float32x4_t a, float32x4_t b) {
    return vmaxq_f32(vbslq_f32(vceqq_f32(a, a), a, b), vbslq_f32(vceqq_f32(b, b), b, a));
}
inline float32x4_t vminnmq_f32(float32x4_t a, float32x4_t b) {
    return vnegq_f32(vmaxnmq_f32(vnegq_f32(a), vnegq_f32(b)));
}
inline float vmaxnmvq_f32(float32x4_t v) {
    for (int i = 1; i < 4; ++i) v.lane[0] = vmaxnmq_f32(v, neon_model::splat<float32x4_t>(v.lane[i])).lane[0];
    return v.lane[0];
}
inline float32x4_t vcvtq_f32_s32(int32x4_t v) {
    return neon_model::each<float32x4_t>([](int32_t x) { return static_cast<float>(x); }, v);
}
// FCVTNS: to nearest, half to even; saturates, and a NaN becomes 0.
inline int32x4_t vcvtnq_s32_f32(float32x4_t v) {
    const auto f = [](float x) {
        if (x != x) return 0;
        const double rounded = std::nearbyint(static_cast<double>(x));
        return static_cast<int32_t>(std::min(std::max(rounded, -2147483648.0), 2147483647.0));
    };
    return neon_model::each<int32x4_t>(f, v);
}

inline float64x2_t vaddq_f64(float64x2_t a, float64x2_t b) {
    return neon_model::each<float64x2_t>([](double x, double y) { return x + y; }, a, b);
}
inline float64x2_t vsubq_f64(float64x2_t a, float64x2_t b) {
    return neon_model::each<float64x2_t>([](double x, double y) { return x - y; }, a, b);
}
inline float64x2_t vmulq_f64(float64x2_t a, float64x2_t b) {
    return neon_model::each<float64x2_t>([](double x, double y) { return x * y; }, a, b);
}
inline float64x2_t vcvt_f64_f32(float32x2_t v) {
    return neon_model::each<float64x2_t>([](float x) { return static_cast<double>(x); }, v);
}
inline float64x2_t vcvt_high_f64_f32(float32x4_t v) {
    return vcvt_f64_f32(neon_model::part<float32x2_t>(v, 2));
}
inline float32x2_t vcvt_f32_f64(float64x2_t v) {
    return neon_model::each<float32x2_t>([](double x) { return static_cast<float>(x); }, v);
}
// FCVTN2: into the high half, behind what stands in the low one.
inline float32x4_t vcvt_high_f32_f64(float32x2_t low, float64x2_t v) {
    return neon_model::bits<float32x4_t>(NeonModel<float32x2_t, 2>{{low, vcvt_f32_f64(v)}});
}

}  // namespace dqk
