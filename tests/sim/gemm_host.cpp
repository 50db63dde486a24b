// The CPU GEMM and embedding under sanitizers, called as the binding calls them, with four kernels more: the
// sources of instruction sets that a machine may lack, on models of their registers (gemm_*_model.cpp).
#if defined(__x86_64__)
#include "amx_model.h"
#endif
#include "dqk/api.h"
#include "protocol.h"

namespace dqk {

namespace {

// scalars: kernel, m, k, row_stride, x_dtype, mode, clip, static_scale, bits, four_level, group_size,
// activation, y_dtype, parts, then for each part: n, tensor_scale, bias_dtype, residual_dtype. buffers: x,
// act_scale, then for each part: qweight, weight_scale, group_mult, bias, residual, y. The seed: threads less
// one.
Status gemm(const sim::Request& request) {
    CpuGemm args = {};
    args.kernel = static_cast<int32_t>(request.integer(0));
    args.m = request.integer(1);
    args.k = request.integer(2);
    args.row_stride = request.integer(3);
    args.x_dtype = static_cast<DType>(request.integer(4));
    args.mode = static_cast<ActMode>(request.integer(5));
    args.clip = static_cast<float>(request.real(6));
    args.static_scale = static_cast<float>(request.real(7));
    args.bits = static_cast<int32_t>(request.integer(8));
    args.four_level = request.integer(9) != 0;
    args.group_size = static_cast<int32_t>(request.integer(10));
    args.activation = static_cast<Activation>(request.integer(11));
    args.y_dtype = static_cast<DType>(request.integer(12));
    args.part_count = static_cast<int32_t>(request.integer(13));
    args.threads = static_cast<int32_t>(request.seed) + 1;
    args.x = request.pointer<const void>(0);
    args.act_scale = request.pointer<const float>(1);
    CpuPart parts[kMaxCpuParts] = {};
    for (int32_t i = 0; i < args.part_count && i < kMaxCpuParts; ++i) {
        const size_t scalar = 14 + 4 * static_cast<size_t>(i), buffer = 2 + 6 * static_cast<size_t>(i);
        parts[i].n = request.integer(scalar);
        parts[i].tensor_scale = request.integer(scalar + 1) != 0;
        parts[i].bias_dtype = static_cast<DType>(request.integer(scalar + 2));
        parts[i].residual_dtype = static_cast<DType>(request.integer(scalar + 3));
        parts[i].qweight = request.pointer<const uint8_t>(buffer);
        parts[i].weight_scale = request.pointer<const float>(buffer + 1);
        parts[i].group_mult = request.pointer<const uint8_t>(buffer + 2);
        parts[i].bias = request.pointer<const void>(buffer + 3);
        parts[i].residual = request.pointer<const void>(buffer + 4);
        parts[i].y = request.pointer<void>(buffer + 5);
    }
    args.parts = parts;
    return cpu_gemm(args);
}

// scalars: kernel, ids32, count, rows, k, bits, four_level, group_size, tensor_scale, embed_scale,
// position_dtype, position_stride, y_dtype. buffers: ids, qweight, weight_scale, group_mult, position, y.
Status embedding(const sim::Request& request) {
    CpuEmbedding args = {};
    args.kernel = static_cast<int32_t>(request.integer(0));
    args.ids32 = request.integer(1) != 0;
    args.count = request.integer(2);
    args.rows = request.integer(3);
    args.k = request.integer(4);
    args.bits = static_cast<int32_t>(request.integer(5));
    args.four_level = request.integer(6) != 0;
    args.group_size = static_cast<int32_t>(request.integer(7));
    args.tensor_scale = request.integer(8) != 0;
    args.embed_scale = static_cast<float>(request.real(9));
    args.position_dtype = static_cast<DType>(request.integer(10));
    args.position_stride = request.integer(11);
    args.y_dtype = static_cast<DType>(request.integer(12));
    args.threads = static_cast<int32_t>(request.seed) + 1;
    args.ids = request.pointer<const void>(0);
    args.qweight = request.pointer<const uint8_t>(1);
    args.weight_scale = request.pointer<const float>(2);
    args.group_mult = request.pointer<const uint8_t>(3);
    args.position = request.pointer<const void>(4);
    args.y = request.pointer<void>(5);
    return cpu_embedding(args);
}

Status run(const sim::Request& request) {
    const Status status = request.function == "embedding" ? embedding(request) : gemm(request);
#if defined(__x86_64__)
    amx_model::require(amx_model::configured == 0, "a thread kept its tiles");
#endif
    return status;
}

}  // namespace
}  // namespace dqk

int main() {
    dqk::sim::serve(dqk::run);
}
