// Rows of a packed table as floats, on a CPU.
#include <cmath>

#include "cpu/gemm_loops.h"
#include "cpu/threads.h"
#include "dqk/api.h"
#include "dqk/element.h"
#include "dqk/format.h"
#include "dqk/shape.h"

namespace dqk {
namespace {

// Elements that one thread writes in the time that others need to wake up.
constexpr int64_t kAlone = 1 << 16, kRows = 16;

bool float_type(DType dtype) {
    return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

int64_t id_at(const CpuEmbedding& args, int64_t i) {
    return args.ids32 ? static_cast<const int32_t*>(args.ids)[i] : static_cast<const int64_t*>(args.ids)[i];
}

Status check(const CpuEmbedding& args) {
    PackedShape shape = {};
    int64_t bytes = 0;
    if (!valid_bits(args.bits)) return Status::bad_bits;
    if (args.count < 0 || args.rows < 0 || args.k < 1 || args.position_stride < 0) return Status::bad_size;
    const bool grouped = args.group_size != 0;
    if (grouped &&
        (args.bits == 8 || (args.group_size != 32 && args.group_size != 64 && args.group_size != 128)))
        return Status::bad_group_size;
    if (!float_type(args.y_dtype) || (args.position != nullptr && !float_type(args.position_dtype)))
        return Status::bad_dtype;
    if (!packed_shape(args.rows, args.k, args.bits, &shape) || !checked_mul(args.count, args.k, &bytes) ||
        !checked_mul(bytes, 4, &bytes) || !checked_mul(args.count, args.position_stride, &bytes))
        return Status::size_overflow;
    if (args.count > 0 && (args.ids == nullptr || args.qweight == nullptr || args.weight_scale == nullptr ||
                           args.y == nullptr || (grouped && args.group_mult == nullptr)))
        return Status::bad_cpu_part;
    for (int64_t i = 0; i < args.count; ++i) {
        const int64_t id = id_at(args, i);
        if (id < 0 || id >= args.rows) return Status::bad_id;
    }
    return Status::ok;
}

}  // namespace

Status cpu_embedding(const CpuEmbedding& args) {
    const GemmKernel* kernel = nullptr;
    Status status = check(args);
    if (status == Status::ok) status = find_gemm_kernel(args.kernel, &kernel);
    if (status != Status::ok) return status;

    const auto embed = kernel->embed[args.bits == 8 ? 0 : args.bits == 4 ? 1 : args.four_level ? 3 : 2];
    const int64_t row_bytes = (args.k + kBlockK - 1) / kBlockK * block_bytes(args.bits);
    const int64_t groups = args.group_size == 0 ? 0 : (args.k + args.group_size - 1) / args.group_size;
    const int32_t threads = args.count * args.k > kAlone ? args.threads : 1;
    parallel_for((args.count + kRows - 1) / kRows, threads, [&](int64_t chunk) {
        for (int64_t i = chunk * kRows; i < args.count && i < (chunk + 1) * kRows; ++i) {
            const int64_t id = id_at(args, i);
            EmbeddingRow row = {};
            row.packed = args.qweight + id * row_bytes;
            row.k = args.k;
            row.scale = args.weight_scale[args.tensor_scale ? 0 : id];
            row.mult = groups == 0 ? nullptr : args.group_mult + id * groups;
            row.group_size = args.group_size;
            row.embed_scale = args.embed_scale;
            if (args.position != nullptr)
                row.position = static_cast<const char*>(args.position) +
                               i * args.position_stride * element_bytes(args.position_dtype);
            row.position_dtype = args.position_dtype;
            row.y = static_cast<char*>(args.y) + i * args.k * element_bytes(args.y_dtype);
            row.y_dtype = args.y_dtype;
            embed(row);
        }
    });
    return Status::ok;
}

}  // namespace dqk
