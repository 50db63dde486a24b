// What the skinny GEMM refuses, how it is cut, and which width's launcher runs. Host code only.
#include "cuda/skinny_launch.h"
#include "dqk/api.h"
#include "dqk/element.h"
#include "dqk/rounding.h"
#include "dqk/skinny_shape.h"

namespace dqk {
namespace {

constexpr int64_t kMaxGrid = 65535;  // of y and z

bool aligned16(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool float_type(DType dtype) {
    return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

// Sizes and options: what can be judged without a pointer.
Status check_sizes(const SkinnyGemm& args) {
    if (!valid_bits(args.bits)) return Status::bad_bits;
    if (args.m < 0 || args.k < 1 || args.row_stride < 0) return Status::bad_size;
    if (args.k > kMaxGemmK) return Status::k_too_large;
    const bool grouped = args.group_size == 32 || args.group_size == 64 || args.group_size == 128;
    if (args.group_size != 0 && (!grouped || args.bits == 8)) return Status::bad_group_size;
    if (args.four_level && args.bits != 2) return Status::bad_bits;
    if (!float_type(args.x_dtype) && args.x_dtype != DType::int8) return Status::bad_dtype;
    if (!float_type(args.y_dtype) && args.y_dtype != DType::int8) return Status::bad_dtype;
    if (!float_type(args.bias_dtype) || !float_type(args.residual_dtype)) return Status::bad_dtype;
    if (args.activation != Activation::none && args.activation != Activation::relu &&
        args.activation != Activation::gelu)
        return Status::bad_activation;
    if (args.x_dtype != DType::int8) {
        if (args.m > kPrologueTokens) return Status::bad_prologue;
        if (args.mode != ActMode::per_token && args.mode != ActMode::per_tensor &&
            args.mode != ActMode::static_scale)
            return Status::bad_mode;
        if (args.clip != 0.0f && (!(args.clip > 0.0f) || non_finite(magnitude_bits(args.clip))))
            return Status::bad_clip;
    }
    if (args.part_count < 1 || args.part_count > kMaxParts) return Status::bad_part;
    int64_t bytes = 0;
    if (!checked_mul(args.m, args.row_stride, &bytes) || !checked_mul(bytes, 4, &bytes) ||
        !checked_mul(args.m, args.k, &bytes) || !checked_mul(bytes, 4, &bytes) ||
        ceil_div(args.m, kSkinnyTokens) > kMaxGrid)
        return Status::size_overflow;
    for (int32_t i = 0; i < args.part_count; ++i) {
        PackedShape packed = {};
        if (args.parts[i].n < 1) return Status::bad_part;
        if (!packed_shape(args.parts[i].n, args.k, args.bits, &packed) ||
            !checked_mul(args.parts[i].n, args.m, &bytes) || !checked_mul(bytes, 4, &bytes))
            return Status::size_overflow;
    }
    if (args.sms < 1 && (args.warps_n == 0 || args.splits == 0)) return Status::bad_plan;
    return Status::ok;
}

Status check_pointers(const SkinnyGemm& args) {
    if (args.x == nullptr) return Status::bad_size;
    const bool reads_scale = args.x_dtype == DType::int8 || args.mode == ActMode::static_scale;
    if (reads_scale && args.act_scale == nullptr) return Status::bad_act_scale;
    if (args.norm_weight != nullptr && (args.x_dtype == DType::int8 || args.norm_y == nullptr))
        return Status::bad_prologue;
    if ((args.y_dtype == DType::int8) != (args.out_scale != nullptr)) return Status::bad_output;
    for (int32_t i = 0; i < args.part_count; ++i) {
        const SkinnyPart& part = args.parts[i];
        if (part.qweight == nullptr || !aligned16(part.qweight) || part.weight_scale == nullptr ||
            part.y == nullptr || (args.group_size != 0 && part.group_mult == nullptr))
            return Status::bad_part;
    }
    return Status::ok;
}

}  // namespace

Status skinny_memory(const SkinnyGemm& args, SkinnyMemory* out) {
    const Status status = check_sizes(args);
    if (status != Status::ok) return status;
    SkinnyShape shape = {};
    *out = SkinnyMemory{};
    if (args.m == 0) return Status::ok;
    if (!skinny_shape(args, &shape)) return Status::bad_plan;
    out->workspace_bytes = workspace_ints(shape) * 4;
    out->counter_bytes = counter_count(shape) * 4;
    out->warps_n = shape.warps_n;
    out->splits = shape.splits;
    return Status::ok;
}

Status cuda_skinny_gemm(const SkinnyGemm& args, void* stream) {
    Status status = check_sizes(args);
    if (status != Status::ok || args.m == 0) return status;
    status = check_pointers(args);
    if (status != Status::ok) return status;
    SkinnyShape shape = {};
    if (!skinny_shape(args, &shape)) return Status::bad_plan;
    if (shape.splits > 1 && (args.workspace == nullptr || args.counters == nullptr))
        return Status::no_workspace;
    switch (args.bits) {
        case 2:
            return launch_skinny_w2(args, shape, stream);
        case 4:
            return launch_skinny_w4(args, shape, stream);
        default:
            return launch_skinny_w8(args, shape, stream);
    }
}

}  // namespace dqk
