// The 512-bit and VNNI instructions that csrc/cpu uses, in plain C++ after Intel's description of each, on
// vectors of the compiler's own. avx512_names.h puts them in the place of the intrinsics;
// avx512_self_test.cpp holds each to plain loops, to its 256-bit twin, and to the instruction itself where a
// processor has it.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"  // nothing here is called: it is all inlined, as intrinsics are
#define DQK_MODEL __attribute__((always_inline, target("avx2,f16c"))) inline

namespace dqk::avx512_model {

// Two types, like __m512i and __m512: neither becomes the other unasked.
struct alignas(64) Ints {
    uint8_t bytes[64];
};
struct alignas(64) Floats {
    uint8_t bytes[64];
};

template <typename T, int kBytes>
struct VectorOf {
    typedef T type __attribute__((vector_size(kBytes)));
};
// The lanes of a register of whatever kind. Unsigned ones wrap.
template <typename T, typename V>
DQK_MODEL auto as(const V& v) {
    typename VectorOf<T, sizeof(V)>::type lanes;
    std::memcpy(&lanes, &v, sizeof v);
    return lanes;
}
template <typename V, typename L>
DQK_MODEL V from(const L& lanes) {
    static_assert(sizeof(V) == sizeof(L), "a register is a register");
    V v;
    std::memcpy(&v, &lanes, sizeof v);
    return v;
}
template <typename V, typename T>
DQK_MODEL V splat(T value) {
    return from<V>(typename VectorOf<T, sizeof(V)>::type{} + value);
}

// ---- loads, stores, parts --------------------------------------------------------------------------------

DQK_MODEL Ints setzero_si512() {
    return Ints{};
}
DQK_MODEL Ints set1_epi8(char x) {
    return splat<Ints>(static_cast<uint8_t>(x));
}
DQK_MODEL Ints set1_epi32(int x) {
    return splat<Ints>(static_cast<uint32_t>(x));
}
DQK_MODEL Floats set1_ps(float x) {
    uint32_t bits;  // not a sum with 0: it would lose the sign of -0
    std::memcpy(&bits, &x, sizeof bits);
    return splat<Floats>(bits);
}
DQK_MODEL Ints loadu_si512(const void* p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
DQK_MODEL void storeu_si512(void* p, Ints v) {
    std::memcpy(p, &v, sizeof v);
}
// What is masked off is not read.
template <typename V, typename T>
DQK_MODEL V load_masked(uint32_t mask, const void* p) {
    T lanes[sizeof(V) / sizeof(T)] = {};
    for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
        if ((mask >> i) & 1u) std::memcpy(&lanes[i], static_cast<const T*>(p) + i, sizeof(T));
    return from<V>(lanes);
}
DQK_MODEL Floats maskz_loadu_ps(__mmask16 mask, const void* p) {
    return load_masked<Floats, uint32_t>(mask, p);
}
DQK_MODEL __m256i maskz_loadu_epi16_256(__mmask16 mask, const void* p) {
    return load_masked<__m256i, uint16_t>(mask, p);
}
// VPMOVDB: the low byte of each word, to where the mask has ones.
DQK_MODEL void mask_cvtepi32_storeu_epi8(void* p, __mmask16 mask, Ints v) {
    for (unsigned i = 0; i < 16; ++i)
        if ((mask >> i) & 1u) static_cast<uint8_t*>(p)[i] = v.bytes[4 * i];
}
// The upper half is anything: here what no code of ours would have left there.
DQK_MODEL Ints castsi256_si512(__m256i low) {
    Ints v = splat<Ints>(uint8_t{0xA5});
    std::memcpy(&v, &low, sizeof low);
    return v;
}
DQK_MODEL __m256i extracti64x4_epi64(Ints v, int half) {
    __m256i part;
    std::memcpy(&part, v.bytes + (half & 1) * 32, sizeof part);
    return part;
}
DQK_MODEL __m256i castsi512_si256(Ints v) {
    return extracti64x4_epi64(v, 0);
}
DQK_MODEL Ints inserti64x4(Ints v, __m256i part, int half) {
    std::memcpy(v.bytes + (half & 1) * 32, &part, sizeof part);
    return v;
}
DQK_MODEL Ints broadcast_i64x4(__m256i v) {
    return inserti64x4(castsi256_si512(v), v, 1);
}
DQK_MODEL Ints castps_si512(Floats v) {
    return from<Ints>(v);
}
DQK_MODEL Floats castsi512_ps(Ints v) {
    return from<Floats>(v);
}

// ---- integers --------------------------------------------------------------------------------------------

DQK_MODEL Ints add_epi8(Ints a, Ints b) {
    return from<Ints>(as<uint8_t>(a) + as<uint8_t>(b));
}
DQK_MODEL Ints add_epi32(Ints a, Ints b) {
    return from<Ints>(as<uint32_t>(a) + as<uint32_t>(b));
}
DQK_MODEL Ints sub_epi32(Ints a, Ints b) {
    return from<Ints>(as<uint32_t>(a) - as<uint32_t>(b));
}
DQK_MODEL Ints mullo_epi32(Ints a, Ints b) {
    return from<Ints>(as<uint32_t>(a) * as<uint32_t>(b));
}
DQK_MODEL Ints and_si512(Ints a, Ints b) {
    return from<Ints>(as<uint64_t>(a) & as<uint64_t>(b));
}
DQK_MODEL Ints xor_si512(Ints a, Ints b) {
    return from<Ints>(as<uint64_t>(a) ^ as<uint64_t>(b));
}
DQK_MODEL Ints max_epu32(Ints a, Ints b) {
    const auto x = as<uint32_t>(a), y = as<uint32_t>(b);
    return from<Ints>(x > y ? x : y);
}
// A count beyond the lane shifts everything out.
DQK_MODEL Ints srli_epi16(Ints a, unsigned count) {
    return count > 15 ? Ints{} : from<Ints>(as<uint16_t>(a) >> static_cast<uint16_t>(count));
}
DQK_MODEL Ints slli_epi32(Ints a, unsigned count) {
    return count > 31 ? Ints{} : from<Ints>(as<uint32_t>(a) << count);
}
// The sign fills up.
DQK_MODEL Ints srai_epi32(Ints a, unsigned count) {
    return from<Ints>(as<int32_t>(a) >> static_cast<int32_t>(count > 31 ? 31 : count));
}
DQK_MODEL Ints srav_epi32(Ints a, Ints counts) {
    const auto count = as<uint32_t>(counts);
    const auto most = count > 31u ? count ^ count ^ 31u : count;
    const auto x = as<int32_t>(a);
    return from<Ints>(x >> as<int32_t>(from<Ints>(most)));
}
// VPTERNLOGD: bit 4 a + 2 b + c of the table, for every bit.
DQK_MODEL Ints ternarylogic_epi32(Ints a, Ints b, Ints c, int table) {
    const auto x = as<uint64_t>(a), y = as<uint64_t>(b), z = as<uint64_t>(c);
    auto out = x ^ x;
    for (int i = 0; i < 8; ++i) {
        if (((table >> i) & 1) == 0) continue;
        out |= ((i & 4) != 0 ? x : ~x) & ((i & 2) != 0 ? y : ~y) & ((i & 1) != 0 ? z : ~z);
    }
    return from<Ints>(out);
}
DQK_MODEL Ints srlv_epi16(Ints a, Ints counts) {
    const auto x = as<uint16_t>(a), count = as<uint16_t>(counts);
    const auto shifted = x >> (count & uint16_t{15});
    return from<Ints>(count > uint16_t{15} ? shifted ^ shifted : shifted);
}
// VPMADDWD: products of neighbouring int16, two to a word. The one sum that does not fit, of four -32768,
// wraps.
DQK_MODEL Ints madd_epi16(Ints a, Ints b) {
    const auto x = as<uint32_t>(a), y = as<uint32_t>(b);
    const auto low = (((x & 0xFFFFu) ^ 0x8000u) - 0x8000u) * (((y & 0xFFFFu) ^ 0x8000u) - 0x8000u);
    const auto high = (((x >> 16) ^ 0x8000u) - 0x8000u) * (((y >> 16) ^ 0x8000u) - 0x8000u);
    return from<Ints>(low + high);
}
// VPDPBUSD: four products of unsigned bytes of u and signed ones of s onto each word, which wraps; nothing
// saturates on the way.
template <typename V>
DQK_MODEL V dpbusd(V sums, V u, V s) {
    auto sum = as<uint32_t>(sums);
    const auto x = as<uint32_t>(u), y = as<uint32_t>(s);
    for (unsigned bit = 0; bit < 32; bit += 8)
        sum += ((x >> bit) & 0xFFu) * ((((y >> bit) & 0xFFu) ^ 0x80u) - 0x80u);
    return from<V>(sum);
}
DQK_MODEL Ints dpbusd_epi32(Ints sums, Ints u, Ints s) {
    return dpbusd(sums, u, s);
}
DQK_MODEL __m256i dpbusd_epi32_256(__m256i sums, __m256i u, __m256i s) {
    return dpbusd(sums, u, s);
}
DQK_MODEL Ints cvtepu16_epi32(__m256i v) {
    uint16_t from16[16];
    uint32_t wide[16];
    std::memcpy(from16, &v, sizeof v);
    for (int i = 0; i < 16; ++i) wide[i] = from16[i];
    return from<Ints>(wide);
}
DQK_MODEL int reduce_add_epi32(Ints v) {
    uint32_t lanes[16], sum = 0;
    std::memcpy(lanes, &v, sizeof v);
    for (const uint32_t lane : lanes) sum += lane;
    return static_cast<int>(sum);
}
DQK_MODEL unsigned reduce_max_epu32(Ints v) {
    uint32_t lanes[16], max = 0;
    std::memcpy(lanes, &v, sizeof v);
    for (const uint32_t lane : lanes) max = lane > max ? lane : max;
    return max;
}

// ---- floats ----------------------------------------------------------------------------------------------

DQK_MODEL Floats add_ps(Floats a, Floats b) {
    return from<Floats>(as<float>(a) + as<float>(b));
}
DQK_MODEL Floats mul_ps(Floats a, Floats b) {
    return from<Floats>(as<float>(a) * as<float>(b));
}
// MINPS, MAXPS: the second operand wherever the comparison is false, so of two zeros and beside a NaN.
DQK_MODEL Floats min_ps(Floats a, Floats b) {
    const auto x = as<float>(a), y = as<float>(b);
    const auto less = x < y;
    const auto bits = less ? as<uint32_t>(a) : as<uint32_t>(b);
    return from<Floats>(bits);
}
DQK_MODEL Floats max_ps(Floats a, Floats b) {
    const auto x = as<float>(a), y = as<float>(b);
    const auto more = x > y;
    const auto bits = more ? as<uint32_t>(a) : as<uint32_t>(b);
    return from<Floats>(bits);
}
DQK_MODEL Floats xor_ps(Floats a, Floats b) {
    return from<Floats>(as<uint32_t>(a) ^ as<uint32_t>(b));
}
// VCVTPH2PS: exact, subnormals too; a signalling NaN comes out quiet.
DQK_MODEL Floats cvtph_ps(__m256i v) {
    uint16_t half[16];
    uint32_t wide[16];
    std::memcpy(half, &v, sizeof v);
    for (int i = 0; i < 16; ++i) {
        const uint32_t sign = (half[i] & 0x8000u) << 16, exponent = (half[i] >> 10) & 31u;
        const uint32_t fraction = half[i] & 0x3FFu;
        if (exponent == 31) {
            wide[i] = sign | 0x7F800000u | (fraction << 13) | (fraction != 0 ? 0x00400000u : 0u);
        } else if (exponent != 0) {
            wide[i] = sign | ((exponent + 112) << 23) | (fraction << 13);
        } else {
            const float size = static_cast<float>(fraction) * 0x1p-24f;
            std::memcpy(&wide[i], &size, sizeof size);
            wide[i] |= sign;
        }
    }
    return from<Floats>(wide);
}

}  // namespace dqk::avx512_model
