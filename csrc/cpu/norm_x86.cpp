// The loops of norm.h for AVX2: the operations and the order of the scalar ones, so the bits are too.
//
// The instruction set is a function attribute, not a flag of this file (quantize_x86.cpp says why).
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/gelu.h"
#include "cpu/norm.h"
#include "dqk/element.h"

#define DQK_AVX2 __attribute__((target("avx2,f16c")))

namespace dqk {
namespace {

DQK_AVX2 void widen_float(const void* x, int64_t k, float* out) {
    std::memcpy(out, x, static_cast<size_t>(k) * sizeof(float));
}

DQK_AVX2 void widen_half(const void* x, int64_t k, float* out) {
    const auto* row = static_cast<const uint16_t*>(x);
    int64_t i = 0;
    for (; i + 8 <= k; i += 8)
        _mm256_storeu_ps(out + i,
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i))));
    for (; i < k; ++i) out[i] = half_to_float(row[i]);
}

DQK_AVX2 void widen_bfloat16(const void* x, int64_t k, float* out) {
    const auto* row = static_cast<const uint16_t*>(x);
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
        _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16)));
    }
    for (; i < k; ++i) out[i] = bfloat16_to_float(row[i]);
}

DQK_AVX2 void narrow_float(const float* x, int64_t k, void* out) {
    std::memcpy(out, x, static_cast<size_t>(k) * sizeof(float));
}

DQK_AVX2 void narrow_half(const float* x, int64_t k, void* out) {
    auto* row = static_cast<uint16_t*>(out);
    int64_t i = 0;
    for (; i + 8 <= k; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < k; ++i) row[i] = float_to_half(x[i]);
}

DQK_AVX2 void narrow_bfloat16(const float* x, int64_t k, void* out) {
    auto* row = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < k; ++i) row[i] = float_to_bfloat16(x[i]);  // integer steps: vectorised as it is
}

DQK_AVX2 void add(const float* x, const float* y, int64_t k, float* __restrict out) {
    for (int64_t i = 0; i < k; ++i) out[i] = x[i] + y[i];
}

DQK_AVX2 inline __m256d low_half(__m256 x) {
    return _mm256_cvtps_pd(_mm256_castps256_ps128(x));
}
DQK_AVX2 inline __m256d high_half(__m256 x) {
    return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
}

DQK_AVX2 void norm(const float* x, int64_t k, const float* weight, const float* bias, double eps,
                   float* out) {
    alignas(32) double lane[kLanes];
    const int64_t whole = k / kLanes * kLanes;
    __m256d low = _mm256_setzero_pd(), high = low;
    for (int64_t i = 0; i < whole; i += kLanes) {
        const __m256 v = _mm256_loadu_ps(x + i);
        low = _mm256_add_pd(low, low_half(v));
        high = _mm256_add_pd(high, high_half(v));
    }
    _mm256_store_pd(lane, low);
    _mm256_store_pd(lane + 4, high);
    for (int64_t i = whole; i < k; ++i) lane[i - whole] += x[i];
    const double mean = sum_of_lanes(lane) / static_cast<double>(k);

    const __m256d mean4 = _mm256_set1_pd(mean);
    low = high = _mm256_setzero_pd();
    for (int64_t i = 0; i < whole; i += kLanes) {
        const __m256 v = _mm256_loadu_ps(x + i);
        const __m256d a = _mm256_sub_pd(low_half(v), mean4), b = _mm256_sub_pd(high_half(v), mean4);
        low = _mm256_add_pd(low, _mm256_mul_pd(a, a));
        high = _mm256_add_pd(high, _mm256_mul_pd(b, b));
    }
    _mm256_store_pd(lane, low);
    _mm256_store_pd(lane + 4, high);
    for (int64_t i = whole; i < k; ++i) {
        const double off = x[i] - mean;
        lane[i - whole] += off * off;
    }
    const double factor = 1.0 / std::sqrt(sum_of_lanes(lane) / static_cast<double>(k) + eps);

    const __m256d factor4 = _mm256_set1_pd(factor);
    for (int64_t i = 0; i < whole; i += kLanes) {
        const __m256 v = _mm256_loadu_ps(x + i);
        const __m128 a = _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_sub_pd(low_half(v), mean4), factor4));
        const __m128 b = _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_sub_pd(high_half(v), mean4), factor4));
        __m256 y =
            _mm256_mul_ps(_mm256_insertf128_ps(_mm256_castps128_ps256(a), b, 1), _mm256_loadu_ps(weight + i));
        if (bias != nullptr) y = _mm256_add_ps(y, _mm256_loadu_ps(bias + i));
        _mm256_storeu_ps(out + i, y);
    }
    for (int64_t i = whole; i < k; ++i) {
        const float y = static_cast<float>((x[i] - mean) * factor) * weight[i];
        out[i] = bias == nullptr ? y : y + bias[i];
    }
}

DQK_AVX2 void gelu_row(const float* x, int64_t k, float* __restrict out) {
    std::memcpy(out, x, static_cast<size_t>(k) * sizeof(float));
    gelu_of(out, k);
}

DQK_AVX2 float largest(const float* x, int64_t k) {
    constexpr int kWide = 4;
    __m256 most[kWide], nan[kWide];
    for (int j = 0; j < kWide; ++j) {
        most[j] = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
        nan[j] = _mm256_setzero_ps();
    }
    int64_t i = 0;
    for (; i + 8 * kWide <= k; i += 8 * kWide)
        for (int j = 0; j < kWide; ++j) {
            const __m256 v = _mm256_loadu_ps(x + i + 8 * j);
            most[j] = _mm256_max_ps(v, most[j]);  // of a NaN and a number the latter
            nan[j] = _mm256_or_ps(nan[j], _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        }
    alignas(32) float lane[8];
    _mm256_store_ps(lane, _mm256_max_ps(_mm256_max_ps(most[0], most[1]), _mm256_max_ps(most[2], most[3])));
    bool has_nan =
        _mm256_movemask_ps(_mm256_or_ps(_mm256_or_ps(nan[0], nan[1]), _mm256_or_ps(nan[2], nan[3]))) != 0;
    float found = *std::max_element(lane, lane + 8);
    for (; i < k; ++i) {
        found = x[i] > found ? x[i] : found;
        has_nan = has_nan || x[i] != x[i];
    }
    return has_nan ? std::numeric_limits<float>::quiet_NaN() : found;
}

}  // namespace

const RowLoops& avx2_row_loops() {
    static constexpr RowLoops kLoops = {
        {widen_float, widen_half, widen_bfloat16},
        {narrow_float, narrow_half, narrow_bfloat16},
        add,
        norm,
        gelu_row,
        largest,
    };
    return kLoops;
}

}  // namespace dqk
#endif
