// What decode attention refuses, and what it needs. Host code only.
#include "dqk/api.h"
#include "dqk/attention_shape.h"
#include "dqk/element.h"
#include "dqk/rounding.h"

namespace dqk {

Status launch_attention_decode(const CudaAttentionDecode& args, const AttentionShape& shape, void* stream);

namespace {

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

bool float_type(DType dtype) {
    return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}
bool multiple_of(const void* pointer, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}
bool empty(const CudaAttentionDecode& args) {
    return args.rows == 0 || args.heads == 0 || args.queries == 0;
}

// Sizes and options: what can be judged without a pointer.
Status check_sizes(const CudaAttentionDecode& args, AttentionShape* shape) {
    if (args.rows < 0 || args.heads < 0 || args.queries < 0 || args.head_dim < 1 ||
        args.head_dim > kMaxAttentionDim || args.head_dim % 4 != 0 || args.capacity < 1 || args.caches < 1)
        return Status::bad_cuda_attention;
    if (args.capacity > kMaxGemmK) return Status::k_too_large;
    if (args.shared && args.by_key) return Status::bad_cuda_attention;
    if (!args.shared && !args.by_key && args.caches != args.rows && !empty(args))
        return Status::bad_cuda_attention;
    if (!float_type(args.dtype) || !float_type(args.bias_dtype)) return Status::bad_dtype;
    if (args.mode != ActMode::per_token && args.mode != ActMode::per_tensor) return Status::bad_mode;
    if (args.clip != 0.0f && (!(args.clip > 0.0f) || non_finite(magnitude_bits(args.clip))))
        return Status::bad_clip;
    for (const int64_t stride : args.q_stride)
        if (stride < 0) return Status::bad_size;
    for (const int64_t stride : args.bias_stride)
        if (stride < 0) return Status::bad_size;
    if (args.form != AttentionForm::rule && args.form != AttentionForm::keep &&
        args.form != AttentionForm::redo)
        return Status::bad_attention_plan;
    if (args.splits < 0 || args.warps < 0 || (args.sms < 1 && (args.splits == 0 || args.warps == 0)))
        return Status::bad_attention_plan;
    // Rows, queries, blocks and all keys of all caches count in 32 bits, elements in 63.
    int64_t blocks = 0, vectors = 0, bytes = 0;
    if (args.rows > kMaxIndex || args.queries > kMaxIndex || args.caches >= kMaxIndex ||
        !checked_mul(args.rows, args.heads, &vectors) || !checked_mul(vectors, args.queries, &vectors) ||
        !checked_mul(vectors, 4 * (kMaxAttentionDim + 4) * kMaxAttentionSplits, &bytes) ||
        !checked_mul(args.rows, args.capacity, &bytes) ||
        !checked_mul(args.caches + 1, args.heads, &blocks) || !checked_mul(blocks, args.capacity, &bytes) ||
        bytes > kMaxIndex || !checked_mul(args.rows, args.capacity, &bytes) || blocks > kMaxIndex ||
        args.rows * args.heads > kMaxIndex)
        return Status::size_overflow;
    if (empty(args)) return Status::ok;
    return attention_shape(args, shape) ? Status::ok : Status::bad_attention_plan;
}

Status check_pointers(const CudaAttentionDecode& args, const AttentionShape& shape) {
    if (args.q == nullptr || args.k == nullptr || args.k_scale == nullptr || args.v == nullptr ||
        args.v_scale == nullptr || args.lengths == nullptr || args.out == nullptr ||
        (args.source == nullptr) == (args.shared || args.by_key))
        return Status::bad_cuda_attention;
    const uintptr_t boundary = args.aligned ? 16 : 4;
    if (!multiple_of(args.k, boundary) || !multiple_of(args.v, boundary)) return Status::bad_cuda_attention;
    if ((workspace_bytes(shape) > 0 && (args.workspace == nullptr || !multiple_of(args.workspace, 8))) ||
        (shape.splits > 1 && args.counters == nullptr))
        return Status::no_workspace;
    return Status::ok;
}

}  // namespace

Status attention_memory(const CudaAttentionDecode& args, AttentionMemory* out) {
    AttentionShape shape = {};
    *out = AttentionMemory{};
    const Status status = check_sizes(args, &shape);
    if (status != Status::ok || empty(args)) return status;
    out->workspace_bytes = workspace_bytes(shape);
    out->counter_bytes = shape.splits == 1 ? 0 : shape.groups * args.heads * 4;
    out->splits = shape.splits;
    out->warps = shape.warps;
    return Status::ok;
}

Status cuda_attention_decode(const CudaAttentionDecode& args, void* stream) {
    AttentionShape shape = {};
    Status status = check_sizes(args, &shape);
    if (status != Status::ok || empty(args)) return status;
    status = check_pointers(args, shape);
    return status == Status::ok ? launch_attention_decode(args, shape, stream) : status;
}

}  // namespace dqk
