// What one instruction set offers LayerNorm, GELU and logits: loops over one row of floats. Everything else
// is in norm.cpp, once.
//
// Every instruction set gives the same bits. The two sums of a norm are the only float sums of the core; they
// are kept in double, in 8 lanes (element i in lane i mod 8) that are added in one order.
#pragma once
#include <cmath>
#include <cstdint>

#include "dqk/api.h"

namespace dqk {

struct RowLoops {
    // Of each float type, by its code: to fp32, and back with one rounding.
    void (*widen[3])(const void* x, int64_t k, float* out);
    void (*narrow[3])(const float* x, int64_t k, void* out);
    void (*add)(const float* x, const float* y, int64_t k, float* out);  // out apart from both
    // out = (x - mean) / sqrt(variance + eps) * weight (+ bias), the quotient rounded once; out may be x.
    void (*norm)(const float* x, int64_t k, const float* weight, const float* bias, double eps, float* out);
    void (*gelu)(const float* x, int64_t k, float* out);  // out apart from x
    float (*largest)(const float* x, int64_t k);          // a NaN above all
};

const RowLoops& scalar_row_loops();

#if defined(__x86_64__)
const RowLoops& avx2_row_loops();  // needs AVX2 and F16C
#endif
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
const RowLoops& neon_row_loops();
#endif

// Those of `isa`.
const RowLoops& row_loops(Isa isa);

constexpr int kLanes = 8;

inline double sum_of_lanes(const double* lane) {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

}  // namespace dqk
