// The loops of norm.h for Arm: the operations and the order of the scalar ones, so the bits are too. They
// were run over modelled instructions (tests/sim/neon_model.h) and in an emulator, never on an Arm processor.
//
// The sum of two rows, GELU and the largest of a row are those of norm_scalar.cpp: every 64-bit Arm has the
// vectors that a compiler makes of them.
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
#include "cpu/neon.h"
//
#include "cpu/norm.h"

namespace dqk {
namespace {

template <DType kType>
DQK_TARGET void widen(const void* x, int64_t k, float* out) {
    ConvertNeon::widen(x, kType, k, out);
}

template <DType kType>
DQK_TARGET void narrow(const float* x, int64_t k, void* out) {
    ConvertNeon::narrow(x, k, out, kType);
}

// 8 floats as pairs of doubles: element i in lane i mod 2 of pair i / 2.
struct Pairs {
    float64x2_t pair[kLanes / 2];
};

DQK_TARGET inline Pairs load_pairs(const float* x) {
    const float32x4_t low = vld1q_f32(x), high = vld1q_f32(x + 4);
    return {{vcvt_f64_f32(vget_low_f32(low)), vcvt_high_f64_f32(low), vcvt_f64_f32(vget_low_f32(high)),
             vcvt_high_f64_f32(high)}};
}

DQK_TARGET void norm(const float* x, int64_t k, const float* weight, const float* bias, double eps,
                     float* out) {
    const int64_t whole = k / kLanes * kLanes;
    float64x2_t sum[kLanes / 2];
    for (auto& pair : sum) pair = vdupq_n_f64(0.0);
    for (int64_t i = 0; i < whole; i += kLanes) {
        const Pairs v = load_pairs(x + i);
        for (int n = 0; n < kLanes / 2; ++n) sum[n] = vaddq_f64(sum[n], v.pair[n]);
    }
    double lane[kLanes];
    for (int n = 0; n < kLanes / 2; ++n) vst1q_f64(lane + 2 * n, sum[n]);
    for (int64_t i = whole; i < k; ++i) lane[i - whole] += x[i];
    const double mean = sum_of_lanes(lane) / static_cast<double>(k);

    const float64x2_t mean2 = vdupq_n_f64(mean);
    for (auto& pair : sum) pair = vdupq_n_f64(0.0);
    for (int64_t i = 0; i < whole; i += kLanes) {
        const Pairs v = load_pairs(x + i);
        for (int n = 0; n < kLanes / 2; ++n) {
            const float64x2_t off = vsubq_f64(v.pair[n], mean2);
            sum[n] = vaddq_f64(sum[n], vmulq_f64(off, off));
        }
    }
    for (int n = 0; n < kLanes / 2; ++n) vst1q_f64(lane + 2 * n, sum[n]);
    for (int64_t i = whole; i < k; ++i) {
        const double off = x[i] - mean;
        lane[i - whole] += off * off;
    }
    const double factor = 1.0 / std::sqrt(sum_of_lanes(lane) / static_cast<double>(k) + eps);

    const float64x2_t factor2 = vdupq_n_f64(factor);
    for (int64_t i = 0; i < whole; i += kLanes) {
        Pairs v = load_pairs(x + i);
        for (auto& pair : v.pair) pair = vmulq_f64(vsubq_f64(pair, mean2), factor2);
        for (int half = 0; half < 2; ++half) {
            const float32x4_t quotient =
                vcvt_high_f32_f64(vcvt_f32_f64(v.pair[2 * half]), v.pair[2 * half + 1]);
            float32x4_t y = vmulq_f32(quotient, vld1q_f32(weight + i + 4 * half));
            if (bias != nullptr) y = vaddq_f32(y, vld1q_f32(bias + i + 4 * half));
            vst1q_f32(out + i + 4 * half, y);
        }
    }
    for (int64_t i = whole; i < k; ++i) {
        const float y = static_cast<float>((x[i] - mean) * factor) * weight[i];
        out[i] = bias == nullptr ? y : y + bias[i];
    }
}

}  // namespace

const RowLoops& neon_row_loops() {
    static const RowLoops kLoops = {
        {widen<DType::float32>, widen<DType::float16>, widen<DType::bfloat16>},
        {narrow<DType::float32>, narrow<DType::float16>, narrow<DType::bfloat16>},
        scalar_row_loops().add,
        norm,
        scalar_row_loops().gelu,
        scalar_row_loops().largest,
    };
    return kLoops;
}

}  // namespace dqk
#endif
