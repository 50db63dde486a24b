// The activation quantizer on a CPU: the rule, the scalar row, and the choice of a faster row.
#include <cstring>

#include "cpu/quantize_row.h"
#include "dqk/api.h"
#include "dqk/element.h"
#include "dqk/rounding.h"
#include "dqk/shape.h"

namespace dqk {
namespace {

template <DType kType>
uint32_t scalar_amax_bits(const void* x, int64_t k) {
    const auto* row = static_cast<const typename Element<kType>::type*>(x);
    uint32_t amax = 0;
    for (int64_t i = 0; i < k; ++i) {
        const uint32_t bits = magnitude_bits(Element<kType>::widen(row[i]));
        amax = bits > amax ? bits : amax;
    }
    return amax;
}

template <DType kType>
int32_t scalar_codes(const void* x, int64_t k, float inv, float clip, int8_t* q) {
    const auto* row = static_cast<const typename Element<kType>::type*>(x);
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) {
        const int32_t code = quantize_one(Element<kType>::widen(row[i]), inv, clip);
        q[i] = static_cast<int8_t>(code);
        sum += code;
    }
    return sum;
}

}  // namespace

RowFunctions row_functions(DType dtype, Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512_vnni || isa == Isa::amx_int8) return avx512_row_functions(dtype);
    if (isa == Isa::avx2 || isa == Isa::avx_vnni) return avx2_row_functions(dtype);
#endif
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
    if (isa == Isa::dotprod) return neon_row_functions(dtype);
#endif
    (void)isa;
    return scalar_row_functions(dtype);
}

RowFunctions scalar_row_functions(DType dtype) {
    switch (dtype) {
        case DType::float16:
            return {scalar_amax_bits<DType::float16>, scalar_codes<DType::float16>};
        case DType::bfloat16:
            return {scalar_amax_bits<DType::bfloat16>, scalar_codes<DType::bfloat16>};
        default:
            return {scalar_amax_bits<DType::float32>, scalar_codes<DType::float32>};
    }
}

void quantize_row(const RowFunctions& functions, const QuantizeRows& args, int64_t m, const void* in,
                  uint32_t amax_bits) {
    const float clip = args.clip == 0.0f ? kNoClip : args.clip;
    const RowScale s = args.mode == ActMode::static_scale ? static_scale(amax_bits, args.act_scale)
                                                          : dynamic_scale(amax_bits, clip);
    int8_t* q = args.q + m * args.k;
    int32_t sum = 0;
    if (s.inv == 0.0f)
        std::memset(q, 0, static_cast<size_t>(args.k));
    else
        sum = functions.codes(in, args.k, s.inv, clip, q);
    args.scale[m] = s.scale;
    if (args.row_sum != nullptr) args.row_sum[m] = sum;
}

Status check(const QuantizeRows& args) {
    int64_t count = 0;
    if (args.rows < 0 || args.k < 1 || args.row_stride < 0) return Status::bad_size;
    if (args.dtype == DType::int8) return Status::bad_dtype;  // codes already; for the GEMM alone
    if (args.k > kMaxRowSumK) return Status::k_too_large;
    // Bytes, not elements: the last row starts row_stride * (rows - 1) elements in.
    if (!checked_mul(args.rows, args.k, &count) || !checked_mul(args.rows, args.row_stride, &count) ||
        !checked_mul(count, element_bytes(args.dtype), &count))
        return Status::size_overflow;
    if (args.clip != 0.0f && (!(args.clip > 0.0f) || non_finite(magnitude_bits(args.clip))))
        return Status::bad_clip;
    if (args.mode == ActMode::static_scale) {
        const uint32_t bits = float_bits(args.act_scale);  // a sign bit sorts above every limit
        if (bits < kMinScaleBits || bits > kMaxScaleBits) return Status::bad_act_scale;
    }
    return Status::ok;
}

Status quantize_rows(const QuantizeRows& args) {
    const Status status = check(args);
    if (status != Status::ok || args.rows == 0) return status;
    Isa isa = Isa::scalar;
    const Status chosen = active_isa(&isa);
    if (chosen != Status::ok) return chosen;

    const RowFunctions row = row_functions(args.dtype, isa);
    const int64_t row_bytes = args.row_stride * element_bytes(args.dtype);
    const char* x = static_cast<const char*>(args.x);

    uint32_t tensor_amax = 0;
    if (args.mode == ActMode::per_tensor)
        for (int64_t m = 0; m < args.rows; ++m) {
            const uint32_t amax = row.amax_bits(x + m * row_bytes, args.k);
            tensor_amax = amax > tensor_amax ? amax : tensor_amax;
        }
    for (int64_t m = 0; m < args.rows; ++m) {
        const void* in = x + m * row_bytes;
        quantize_row(row, args, m, in,
                     args.mode == ActMode::per_tensor ? tensor_amax : row.amax_bits(in, args.k));
    }
    return Status::ok;
}

}  // namespace dqk
