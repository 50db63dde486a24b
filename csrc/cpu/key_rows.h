// Rows of queries, keys and values on their way to codes, for attention and for what fills its caches.
#pragma once
#include <cstring>

#include "cpu/quantize_row.h"
#include "dqk/api.h"
#include "dqk/element.h"
#include "dqk/rounding.h"

namespace dqk {

// Row [a, b, c] of an operand.
inline const char* row_of(const Operand& x, int64_t a, int64_t b, int64_t c) {
    return static_cast<const char*>(x.data) +
           (a * x.stride[0] + b * x.stride[1] + c * x.stride[2]) * element_bytes(x.dtype);
}

inline bool valid_strides(const Operand& x) {
    for (const int64_t stride : x.stride)
        if (stride < 0) return false;
    return true;
}

inline bool valid_strides(const Cache& cache) {
    for (int i = 0; i < 3; ++i)
        if (cache.stride[i] < 0 || cache.scale_stride[i] < 0) return false;
    return true;
}

// Where a key stands in a cache.
struct Place {
    int8_t* codes;
    float* scale;
};

inline Place place_of(const Cache& cache, int64_t which, int64_t head, int64_t key) {
    return {cache.codes + which * cache.stride[0] + head * cache.stride[1] + key * cache.stride[2],
            cache.scale + which * cache.scale_stride[0] + head * cache.scale_stride[1] +
                key * cache.scale_stride[2]};
}

// The rule of one operand of attention: a scale of its own for every row, or one for all.
struct RowRule {
    RowFunctions functions;
    int64_t head_dim;
    float clip;
    bool per_tensor;
    uint32_t amax_bits;  // of the whole tensor, under per_tensor

    // Codes of a row, and its scale.
    float operator()(const void* row, int8_t* codes) const {
        const RowScale s = dynamic_scale(per_tensor ? amax_bits : functions.amax_bits(row, head_dim), clip);
        if (s.inv == 0.0f)
            std::memset(codes, 0, static_cast<size_t>(head_dim));
        else
            functions.codes(row, head_dim, s.inv, clip, codes);
        return s.scale;
    }

    // Likewise for V: a zero row has scale 0, for the quantizer's 1 would become the largest of all.
    float of_value(const void* row, int8_t* codes) const {
        const float scale = (*this)(row, codes);
        int8_t any = 0;
        for (int64_t d = 0; d < head_dim; ++d) any = static_cast<int8_t>(any | codes[d]);
        return any == 0 && !non_finite(magnitude_bits(scale)) ? 0.0f : scale;
    }
};

// The rule of an operand [batch, heads, tokens, head_dim] in a call; reads the whole operand under
// per_tensor.
inline RowRule row_rule(const Operand& x, Isa isa, ActMode mode, float clip, int64_t batch, int64_t heads,
                        int64_t tokens, int64_t head_dim) {
    RowRule rule = {row_functions(x.dtype, isa), head_dim, clip == 0.0f ? kNoClip : clip,
                    mode == ActMode::per_tensor, 0};
    if (rule.per_tensor)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t t = 0; t < tokens; ++t) {
                    const uint32_t amax = rule.functions.amax_bits(row_of(x, b, h, t), head_dim);
                    rule.amax_bits = amax > rule.amax_bits ? amax : rule.amax_bits;
                }
    return rule;
}

}  // namespace dqk
