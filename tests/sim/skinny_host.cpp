// cuda_skinny_gemm on the simulator, called as the binding calls it; `memory` asks skinny_memory instead,
// `launch far rows` puts more than 2^31 elements between the rows first.
#include <sys/mman.h>

#include "dqk/api.h"
#include "protocol.h"

namespace {

// The rows of x (m of them, adjacent) at a stride of 2^31 + 64 elements. Memory that nobody touches costs
// nothing.
void move_far(dqk::SkinnyGemm* args) {
    const size_t element = args->x_dtype == dqk::DType::int8      ? 1
                           : args->x_dtype == dqk::DType::float32 ? 4
                                                                  : 2;
    args->row_stride = (int64_t{1} << 31) + 64;
    const size_t bytes = static_cast<size_t>(args->m * args->row_stride) * element;
    void* far =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (far == MAP_FAILED) std::abort();
    for (int64_t row = 0; row < args->m; ++row)
        std::memcpy(static_cast<char*>(far) + static_cast<size_t>(row * args->row_stride) * element,
                    static_cast<const char*>(args->x) + static_cast<size_t>(row * args->k) * element,
                    static_cast<size_t>(args->k) * element);
    args->x = far;
}

// scalars: m, k, row_stride, x_dtype, mode, clip, norm_eps, bits, four_level, group_size, tensor_scale,
// bias_dtype, residual_dtype, activation, y_dtype, warps_n, splits, sms, part_count, n of each part. buffers:
// x, act_scale, norm_weight, norm_bias, norm_y, out_scale, workspace, counters, then of each part qweight,
// weight_scale, group_mult, bias, residual, y. For `memory` a single one, int64 [4].
dqk::Status run(const dqk::sim::Request& request) {
    dqk::SkinnyGemm args = {};
    size_t i = 0;
    const auto next = [&] { return request.integer(i++); };
    args.m = next();
    args.k = next();
    args.row_stride = next();
    args.x_dtype = static_cast<dqk::DType>(next());
    args.mode = static_cast<dqk::ActMode>(next());
    args.clip = static_cast<float>(request.real(i++));
    args.norm_eps = static_cast<float>(request.real(i++));
    args.bits = static_cast<int32_t>(next());
    args.four_level = next() != 0;
    args.group_size = static_cast<int32_t>(next());
    args.tensor_scale = next() != 0;
    args.bias_dtype = static_cast<dqk::DType>(next());
    args.residual_dtype = static_cast<dqk::DType>(next());
    args.activation = static_cast<dqk::Activation>(next());
    args.y_dtype = static_cast<dqk::DType>(next());
    args.warps_n = static_cast<int32_t>(next());
    args.splits = static_cast<int32_t>(next());
    args.sms = static_cast<int32_t>(next());
    args.part_count = static_cast<int32_t>(next());
    for (int32_t part = 0; part < args.part_count && part < dqk::kMaxParts; ++part)
        args.parts[part].n = next();
    if (request.function == "memory") {
        dqk::SkinnyMemory memory = {};
        const dqk::Status status = dqk::skinny_memory(args, &memory);
        auto* out = request.pointer<int64_t>(0);
        out[0] = memory.workspace_bytes, out[1] = memory.counter_bytes;
        out[2] = memory.warps_n, out[3] = memory.splits;
        return status;
    }
    size_t b = 0;
    args.x = request.pointer<const void>(b++);
    args.act_scale = request.pointer<const float>(b++);
    args.norm_weight = request.pointer<const void>(b++);
    args.norm_bias = request.pointer<const void>(b++);
    args.norm_y = request.pointer<void>(b++);
    args.out_scale = request.pointer<const float>(b++);
    args.workspace = request.pointer<int32_t>(b++);
    args.counters = request.pointer<uint32_t>(b++);
    for (int32_t part = 0; part < args.part_count && part < dqk::kMaxParts && b + 6 <= request.buffers.size();
         ++part) {
        dqk::SkinnyPart& p = args.parts[part];
        p.qweight = request.pointer<const uint8_t>(b++);
        p.weight_scale = request.pointer<const float>(b++);
        p.group_mult = request.pointer<const uint8_t>(b++);
        p.bias = request.pointer<const void>(b++);
        p.residual = request.pointer<const void>(b++);
        p.y = request.pointer<void>(b++);
    }
    if (request.function == "launch far rows") move_far(&args);
    return dqk::cuda_skinny_gemm(args, nullptr);
}

}  // namespace

int main() {
    dqk::sim::serve(run);
}
