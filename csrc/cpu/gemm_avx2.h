// 256-bit operations that AVX2 and AVX-VNNI share: loads, unpacking, sums of lanes, conversions.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "cpu/gemm_table.h"

namespace dqk {
namespace {

DQK_TARGET inline __m256i load256(const void* base, int64_t i) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(base) + i);
}
DQK_TARGET inline void store256(void* base, int64_t i, __m256i v) {
    _mm256_storeu_si256(static_cast<__m256i*>(base) + i, v);
}

// Bytes shifted as pairs: what comes over from the neighbour is masked off.
template <int kShift>
DQK_TARGET inline __m256i field(__m256i v, __m256i mask) {
    return _mm256_and_si256(kShift == 0 ? v : _mm256_srli_epi16(v, kShift), mask);
}

// The 128 codes of a block as unsigned bytes, in the order of k.
template <typename F>
DQK_TARGET inline void unpack256(const uint8_t* block, __m256i (&u)[4]) {
    if constexpr (F::kBits == 8) {
        const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
        for (int j = 0; j < 4; ++j) u[j] = _mm256_xor_si256(load256(block, j), flip);
    } else if constexpr (F::kBits == 4) {
        const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x88)), mask = _mm256_set1_epi8(0x0F);
        for (int j = 0; j < 2; ++j) {
            const __m256i v = _mm256_xor_si256(load256(block, j), flip);
            u[j] = field<0>(v, mask);
            u[j + 2] = field<4>(v, mask);
        }
    } else {
        const __m256i flip = _mm256_set1_epi8(static_cast<char>(0xAA));
        const __m256i v = _mm256_xor_si256(load256(block, 0), flip);
        if constexpr (F::kFactor == 1) {
            const __m256i mask = _mm256_set1_epi8(0x03);
            u[0] = field<0>(v, mask);
            u[1] = field<2>(v, mask);
            u[2] = field<4>(v, mask);
            u[3] = field<6>(v, mask);
        } else {
            const __m256i mask = _mm256_set1_epi8(0x06);
            u[0] = _mm256_and_si256(_mm256_add_epi8(v, v), mask);
            u[1] = field<1>(v, mask);
            u[2] = field<3>(v, mask);
            u[3] = field<5>(v, mask);
        }
    }
}

// The four sums over the lanes of four registers.
DQK_TARGET inline __m128i reduce256(const __m256i (&s)[kGemmRows]) {
    const __m256i ab = _mm256_hadd_epi32(s[0], s[1]), cd = _mm256_hadd_epi32(s[2], s[3]);
    const __m256i all = _mm256_hadd_epi32(ab, cd);
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// 8 rows of 8 words: row i of the result holds word i of each.
DQK_TARGET inline void transpose256(__m256i (&a)[8]) {
    __m256i b[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
        b[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) a[i] = b[i];
}

// A block of 8 rows of weights, as the columns of a panel: 4 unsigned codes of each in a step.
template <typename F>
DQK_TARGET inline void pack256(const uint8_t* rows, int64_t row_bytes, uint8_t* panel, int64_t step) {
    __m256i u[8][4];
    for (int r = 0; r < 8; ++r) unpack256<F>(rows + r * row_bytes, u[r]);
    for (int j = 0; j < 4; ++j) {
        __m256i words[8];
        for (int r = 0; r < 8; ++r) words[r] = u[r][j];
        transpose256(words);
        for (int i = 0; i < 8; ++i) store256(panel + (8 * j + i) * step, 0, words[i]);
    }
}

// The start of a span for int32 lanes: minus the offset times the sum of its activations.
DQK_TARGET inline int32_t start256(const uint8_t* x, int64_t codes, int32_t offset) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < codes / 32; ++i) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load256(x, i));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1));
    return -offset * _mm_cvtsi128_si32(four);
}

// What dots of 32 codes share. Sums are 8 lanes of int32.
struct Dot256 {
    using Vec = __m256i;
    using Sum = __m256i;
    using Partial = __m256i;
    static constexpr int64_t kCodes = 32, kGrain = 32, kXBytes = 1, kVecBytes = 32, kSteps = 0;
    static constexpr int kTokens = 2;
    // 12 sums, two vectors of weights, a word of activations and a product: all 16 registers.
    static constexpr int kPanelRows = 6;
    static constexpr int64_t kPanelSteps = 0;

    static DQK_TARGET inline Sum sum_zero() { return _mm256_setzero_si256(); }
    static DQK_TARGET inline Partial zero() { return _mm256_setzero_si256(); }
    static DQK_TARGET inline Vec splat(int32_t code) { return _mm256_set1_epi8(static_cast<char>(code)); }
    static DQK_TARGET inline Vec load(const uint8_t* base, int64_t i) { return load256(base, i); }
    static DQK_TARGET inline void store(Vec v, uint8_t* base, int64_t i) { store256(base, i, v); }
    static DQK_TARGET inline Partial load_partial(const uint8_t* base, int64_t i) { return load256(base, i); }
    static DQK_TARGET inline void store_partial(Partial p, uint8_t* base, int64_t i) { store256(base, i, p); }
    static DQK_TARGET inline void reduce(const Sum (&s)[kGemmRows], int32_t* acc) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(acc), reduce256(s));
    }
    static DQK_TARGET inline void add_reduced(const Sum (&s)[kGemmRows], int32_t* acc) {
        __m128i* to = reinterpret_cast<__m128i*>(acc);
        _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), reduce256(s)));
    }
    static DQK_TARGET inline __m256i broadcast(const uint8_t* word) {
        int32_t value;
        std::memcpy(&value, word, sizeof value);
        return _mm256_set1_epi32(value);
    }
    static DQK_TARGET inline Partial broadcast_start(const uint8_t* word) { return broadcast(word); }
    static DQK_TARGET inline Sum load_sum(const int32_t* from) { return load256(from, 0); }
    static DQK_TARGET inline void store_sum(Sum s, int32_t* to) { store256(to, 0, s); }
    static DQK_TARGET inline int32_t start(const uint8_t* x, int64_t codes, int32_t offset) {
        return start256(x, codes, offset);
    }
    template <typename F>
    static DQK_TARGET inline void pack_block(const uint8_t* rows, int64_t row_bytes, uint8_t* panel,
                                             int64_t step) {
        pack256<F>(rows, row_bytes, panel, step);
    }
    static DQK_TARGET inline void pin(Partial& p) { __asm__ volatile("" : "+x"(p)); }
    template <typename F>
    static DQK_TARGET inline void unpack(const uint8_t* block, Vec (&u)[4]) {
        unpack256<F>(block, u);
    }
};

// ---- fp32 to and from 16 bits, as element.h does it ------------------------------------------------------

struct Convert256 {
    static DQK_TARGET inline void widen(const void* from, DType dtype, int64_t count, float* to) {
        const auto* halves = static_cast<const uint16_t*>(from);
        int64_t i = 0;
        if (dtype == DType::float32) {
            std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
            return;
        }
        for (; i + 8 <= count; i += 8) {
            const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
            const __m256 wide = dtype == DType::float16
                                    ? _mm256_cvtph_ps(raw)
                                    : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
            _mm256_storeu_ps(to + i, wide);
        }
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
            for (; i + 8 <= count; i += 8)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i),
                                 _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
        if (dtype == DType::bfloat16)
            for (; i + 8 <= count; i += 8)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i), bfloat16(from + i));
        for (; i < count; ++i) store_element(to, dtype, i, from[i]);
    }

  private:
    // Round half to even on the bits; a NaN becomes 0x7FC0.
    static DQK_TARGET inline __m128i bfloat16(const float* from) {
        const __m256 x = _mm256_loadu_ps(from);
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), nan);
        return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    }
};

}  // namespace
}  // namespace dqk
