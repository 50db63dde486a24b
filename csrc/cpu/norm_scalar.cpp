// The loops of norm.h in plain C++, and the choice of faster ones.
#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/gelu.h"
#include "cpu/norm.h"
#include "dqk/element.h"

namespace dqk {
namespace {

template <DType kType>
void widen(const void* x, int64_t k, float* out) {
    const auto* row = static_cast<const typename Element<kType>::type*>(x);
    for (int64_t i = 0; i < k; ++i) out[i] = Element<kType>::widen(row[i]);
}

template <DType kType>
void narrow(const float* x, int64_t k, void* out) {
    for (int64_t i = 0; i < k; ++i) store_element(out, kType, i, x[i]);
}

void add(const float* x, const float* y, int64_t k, float* __restrict out) {
    for (int64_t i = 0; i < k; ++i) out[i] = x[i] + y[i];
}

void norm(const float* x, int64_t k, const float* weight, const float* bias, double eps, float* out) {
    double lane[kLanes] = {};
    for (int64_t i = 0; i < k; ++i) lane[i % kLanes] += x[i];
    const double mean = sum_of_lanes(lane) / static_cast<double>(k);
    std::memset(lane, 0, sizeof lane);
    for (int64_t i = 0; i < k; ++i) {
        const double off = x[i] - mean;
        lane[i % kLanes] += off * off;
    }
    const double factor = 1.0 / std::sqrt(sum_of_lanes(lane) / static_cast<double>(k) + eps);
    for (int64_t i = 0; i < k; ++i) {
        const float y = static_cast<float>((x[i] - mean) * factor) * weight[i];
        out[i] = bias == nullptr ? y : y + bias[i];
    }
}

void gelu_row(const float* x, int64_t k, float* __restrict out) {
    std::memcpy(out, x, static_cast<size_t>(k) * sizeof(float));
    gelu_of(out, k);
}

float largest(const float* x, int64_t k) {
    constexpr int kWide = 16;
    float most[kWide];
    uint32_t nan[kWide] = {}, any = 0;
    std::fill(most, most + kWide, -std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + kWide <= k; i += kWide)
        for (int j = 0; j < kWide; ++j) {
            const float v = x[i + j];
            most[j] = v > most[j] ? v : most[j];
            nan[j] |= v != v ? 1U : 0U;
        }
    for (; i < k; ++i) {
        most[0] = x[i] > most[0] ? x[i] : most[0];
        nan[0] |= x[i] != x[i] ? 1U : 0U;
    }
    for (const uint32_t one : nan) any |= one;
    return any != 0 ? std::numeric_limits<float>::quiet_NaN() : *std::max_element(most, most + kWide);
}

}  // namespace

const RowLoops& scalar_row_loops() {
    static constexpr RowLoops kLoops = {
        {widen<DType::float32>, widen<DType::float16>, widen<DType::bfloat16>},
        {narrow<DType::float32>, narrow<DType::float16>, narrow<DType::bfloat16>},
        add,
        norm,
        gelu_row,
        largest,
    };
    return kLoops;
}

const RowLoops& row_loops(Isa isa) {
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
    if (isa == Isa::dotprod) return neon_row_loops();
#endif
#if defined(__x86_64__)
    if (isa != Isa::scalar) return avx2_row_loops();
#endif
    (void)isa;
    return scalar_row_loops();
}

}  // namespace dqk
