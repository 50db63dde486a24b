// The quantizer's two row loops for AVX2 and AVX-512. The operations and their order per element are those of
// quantize_one (rounding.h), so the bits are too; only integer sums and maxima are regrouped. AVX-512 ran
// on a Zen 4, and in CI over modelled instructions (tests/sim/avx512_model.h).
//
// The instruction set is a function attribute, not a flag of this file: inline functions of shared headers
// must never be compiled for it, or the linker could pick that copy for a CPU without it.
#if defined(__x86_64__)
// GCC 12 warns about its own _mm512_undefined_* (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "cpu/quantize_row.h"
#include "dqk/element.h"
#include "dqk/rounding.h"

#define DQK_AVX2 __attribute__((target("avx2,f16c")))
#define DQK_AVX512 __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")))

namespace dqk {
namespace {

// ---- AVX2: 8 elements a step, a scalar tail ---------------------------------------------------------------

template <DType kType>
DQK_AVX2 inline __m256 load8(const void* x, int64_t i) {
    if constexpr (kType == DType::float32) return _mm256_loadu_ps(static_cast<const float*>(x) + i);
    const __m128i raw =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + i));
    if constexpr (kType == DType::float16) return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

DQK_AVX2 inline __m256 clamp8(__m256 x, __m256 limit) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return _mm256_max_ps(_mm256_min_ps(x, limit), _mm256_xor_ps(limit, sign));
}

template <DType kType>
DQK_AVX2 uint32_t avx2_amax_bits(const void* x, int64_t k) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i amax = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 8 <= k; i += 8)
        amax = _mm256_max_epu32(amax, _mm256_and_si256(_mm256_castps_si256(load8<kType>(x, i)), mask));
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(amax), _mm256_extracti128_si256(amax, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xB1));
    const auto* row = static_cast<const typename Element<kType>::type*>(x);
    auto result = static_cast<uint32_t>(_mm_cvtsi128_si32(four));
    for (; i < k; ++i) {
        const uint32_t bits = magnitude_bits(Element<kType>::widen(row[i]));
        result = bits > result ? bits : result;
    }
    return result;
}

template <DType kType>
DQK_AVX2 int32_t avx2_codes(const void* x, int64_t k, float inv, float clip, int8_t* q) {
    const __m256 inv8 = _mm256_set1_ps(inv), clip8 = _mm256_set1_ps(clip);
    const __m256 limit = _mm256_set1_ps(kQuantMax), magic = _mm256_set1_ps(kMagic);
    const __m256i magic_bits = _mm256_set1_epi32(static_cast<int32_t>(kMagicBits));
    __m256i sum8 = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        const __m256 t = clamp8(_mm256_mul_ps(clamp8(load8<kType>(x, i), clip8), inv8), limit);
        const __m256i code = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(t, magic)), magic_bits);
        sum8 = _mm256_add_epi32(sum8, code);
        const __m128i words =
            _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), _mm_packs_epi16(words, words));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum8);
    const auto* row = static_cast<const typename Element<kType>::type*>(x);
    int32_t sum = 0;
    for (const int32_t lane : lanes) sum += lane;
    for (; i < k; ++i) {
        const int32_t code = quantize_one(Element<kType>::widen(row[i]), inv, clip);
        q[i] = static_cast<int8_t>(code);
        sum += code;
    }
    return sum;
}

// ---- AVX-512: 16 elements a step, a masked tail that touches no byte past the row -------------------------

template <DType kType>
DQK_AVX512 inline __m512 load16(const void* x, int64_t i, __mmask16 lanes) {
    if constexpr (kType == DType::float32)
        return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + i);
    const __m256i raw = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(x) + i);
    if constexpr (kType == DType::float16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

DQK_AVX512 inline __mmask16 lanes_left(int64_t left) {
    return left >= 16 ? static_cast<__mmask16>(0xFFFF) : static_cast<__mmask16>((1u << left) - 1u);
}

DQK_AVX512 inline __m512 clamp16(__m512 x, __m512 limit) {
    return _mm512_max_ps(_mm512_min_ps(x, limit), _mm512_xor_ps(limit, _mm512_set1_ps(-0.0f)));
}

template <DType kType>
DQK_AVX512 uint32_t avx512_amax_bits(const void* x, int64_t k) {
    const __m512i mask = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i amax = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 16) {
        const __m512 v = load16<kType>(x, i, lanes_left(k - i));  // masked-off lanes read as 0
        amax = _mm512_max_epu32(amax, _mm512_and_si512(_mm512_castps_si512(v), mask));
    }
    return _mm512_reduce_max_epu32(amax);
}

template <DType kType>
DQK_AVX512 int32_t avx512_codes(const void* x, int64_t k, float inv, float clip, int8_t* q) {
    const __m512 inv16 = _mm512_set1_ps(inv), clip16 = _mm512_set1_ps(clip);
    const __m512 limit = _mm512_set1_ps(kQuantMax), magic = _mm512_set1_ps(kMagic);
    const __m512i magic_bits = _mm512_set1_epi32(static_cast<int32_t>(kMagicBits));
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 16) {
        const __mmask16 lanes = lanes_left(k - i);
        const __m512 t = clamp16(_mm512_mul_ps(clamp16(load16<kType>(x, i, lanes), clip16), inv16), limit);
        const __m512i code = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(t, magic)), magic_bits);
        sum = _mm512_add_epi32(sum, code);
        _mm512_mask_cvtepi32_storeu_epi8(q + i, lanes, code);
    }
    return _mm512_reduce_add_epi32(sum);
}

}  // namespace

RowFunctions avx2_row_functions(DType dtype) {
    switch (dtype) {
        case DType::float16:
            return {avx2_amax_bits<DType::float16>, avx2_codes<DType::float16>};
        case DType::bfloat16:
            return {avx2_amax_bits<DType::bfloat16>, avx2_codes<DType::bfloat16>};
        default:
            return {avx2_amax_bits<DType::float32>, avx2_codes<DType::float32>};
    }
}

RowFunctions avx512_row_functions(DType dtype) {
    switch (dtype) {
        case DType::float16:
            return {avx512_amax_bits<DType::float16>, avx512_codes<DType::float16>};
        case DType::bfloat16:
            return {avx512_amax_bits<DType::bfloat16>, avx512_codes<DType::bfloat16>};
        default:
            return {avx512_amax_bits<DType::float32>, avx512_codes<DType::float32>};
    }
}

}  // namespace dqk
#endif
