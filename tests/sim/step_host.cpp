// The two ends of a decode step, and where its tokens stand, under sanitizers.
#define DQK_TARGET
#include "cpu/decoder_step.h"
#include "cpu/gemm_plain.h"
#include "dqk/api.h"
#include "protocol.h"

namespace dqk {

// What the GEMM lists on the simulator (gemm_host.cpp); nothing here calls it.
const GemmKernel& model_512_gemm() {
    static constexpr GemmKernel kernel = kernel_of<Plain<64>>("model_512");
    return kernel;
}
const GemmKernel& model_dotprod_gemm() {
    return model_512_gemm();
}
const GemmKernel& model_amx_gemm() {
    return model_512_gemm();
}

namespace {

// scalars: rows, k, dtype, factor, table_rows, offset. buffers: x, table, position.
Status position(const sim::Request& request) {
    AddPosition args = {};
    args.rows = request.integer(0);
    args.k = request.integer(1);
    args.dtype = static_cast<DType>(request.integer(2));
    args.factor = static_cast<float>(request.real(3));
    args.table_rows = request.integer(4);
    args.offset = request.integer(5);
    args.x = request.pointer<void>(0);
    args.table = request.pointer<const void>(1);
    args.position = request.pointer<const int32_t>(2);
    return add_position(args);
}

// scalars: rows, n, dtype, bias_dtype, rounded. buffers: x, bias, y, best. The seed: threads less one.
Status logits(const sim::Request& request) {
    FinishLogits args = {};
    args.rows = request.integer(0);
    args.n = request.integer(1);
    args.dtype = static_cast<DType>(request.integer(2));
    args.bias_dtype = static_cast<DType>(request.integer(3));
    args.rounded = request.integer(4) != 0;
    args.x = request.pointer<const void>(0);
    args.bias = request.pointer<const void>(1);
    args.y = request.pointer<float>(2);
    args.best = request.pointer<int64_t>(3);
    args.threads = static_cast<int32_t>(request.seed) + 1;
    return finish_logits(args);
}

// scalars: rows, capacity, position. buffers: given tokens, tokens, positions, lengths, ancestors.
Status place(const sim::Request& request) {
    StepRows rows = {};
    rows.rows = request.integer(0);
    rows.capacity = request.integer(1);
    rows.tokens = request.pointer<int64_t>(1);
    rows.positions = request.pointer<int32_t>(2);
    rows.lengths = request.pointer<int32_t>(3);
    rows.ancestors = request.pointer<int32_t>(4);
    DecoderStep step;
    step.set_rows(rows);
    return step.place(request.pointer<const int64_t>(0), request.integer(2));
}

Status run(const sim::Request& request) {
    if (request.function == "position") return position(request);
    return request.function == "logits" ? logits(request) : place(request);
}

}  // namespace
}  // namespace dqk

int main() {
    dqk::sim::serve(dqk::run);
}
