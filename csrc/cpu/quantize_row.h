// What one instruction set offers the row quantizer: two loops over one row. Everything else is in
// quantize.cpp, once.
#pragma once
#include <cstdint>

#include "dqk/api.h"

namespace dqk {

struct RowFunctions {
    // Largest magnitude_bits of a row: Inf and NaN come out on top.
    uint32_t (*amax_bits)(const void* x, int64_t k);
    // Codes of a finite row with inv > 0; returns their sum.
    int32_t (*codes)(const void* x, int64_t k, float inv, float clip, int8_t* q);
};

// Those of `isa`.
RowFunctions row_functions(DType dtype, Isa isa);

// Codes, scale and sum of row m of a call, which lies at `in`; amax_bits is its largest magnitude, or that of
// the tensor.
void quantize_row(const RowFunctions& functions, const QuantizeRows& args, int64_t m, const void* in,
                  uint32_t amax_bits);

RowFunctions scalar_row_functions(DType dtype);

#if defined(__x86_64__)
RowFunctions avx2_row_functions(DType dtype);    // needs AVX2 and F16C
RowFunctions avx512_row_functions(DType dtype);  // needs AVX-512 F, BW, DQ, VL
#endif
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
RowFunctions neon_row_functions(DType dtype);
#endif

}  // namespace dqk
