// The NEON intrinsics that csrc/cpu/gemm_dotprod.cpp uses, lane by lane in plain C++ after Arm's description
// of each instruction: its real source then runs on any machine. Lanes wrap, as there; vcvt rounds as
// rounding.h does, which the conversion tests hold to IEEE.
#pragma once
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

}  // namespace dqk
