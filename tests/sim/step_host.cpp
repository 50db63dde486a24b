// The two ends of a decode step, where its tokens stand, and beam search behind it, under sanitizers.
#include "cpu/decoder_step.h"
#include "cpu/gemm_loops.h"
#include "dqk/api.h"
#include "protocol.h"

namespace dqk {

// What the GEMM lists on the simulator; nothing here calls it.
const GemmKernel& model_avx_vnni_gemm() {
    return scalar_gemm();
}
const GemmKernel& model_avx512_vnni_gemm() {
    return scalar_gemm();
}
const GemmKernel& model_amx_gemm() {
    return scalar_gemm();
}
const GemmKernel& model_dotprod_gemm() {
    return scalar_gemm();
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

// scalars: sources, beams, n, kept. buffers: scores, running, value, beam, token. The seed: threads less one.
Status candidates(const sim::Request& request) {
    BeamCandidates args = {};
    args.sources = request.integer(0);
    args.beams = request.integer(1);
    args.n = request.integer(2);
    args.kept = request.integer(3);
    args.scores = request.pointer<const float>(0);
    args.running = request.pointer<const float>(1);
    args.value = request.pointer<float>(2);
    args.beam = request.pointer<int64_t>(3);
    args.token = request.pointer<int64_t>(4);
    args.threads = static_cast<int32_t>(request.seed) + 1;
    return beam_candidates(args);
}

// scalars: rows, row_stride, length, size, n. buffers: tokens, scores.
Status repeats(const sim::Request& request) {
    BanRepeats args = {};
    args.rows = request.integer(0);
    args.row_stride = request.integer(1);
    args.length = request.integer(2);
    args.size = request.integer(3);
    args.n = request.integer(4);
    args.tokens = request.pointer<const int64_t>(0);
    args.scores = request.pointer<float>(1);
    return ban_repeats(args);
}

// scalars: sources, beams, start, most, filling, length, kept, all_end, early, divisor. buffers: running,
// came_from, scores, finished, finished_from, finished_scores, finished_lengths, is_finished, improvable,
// value, beam, token, ends or absent, end tokens, parents, tokens, goes_on.
Status extend(const sim::Request& request) {
    BeamExtend args = {};
    BeamState& state = args.state;
    state.sources = request.integer(0);
    state.beams = request.integer(1);
    state.start = request.integer(2);
    state.most = request.integer(3);
    state.filling = request.integer(4);
    args.length = request.integer(5);
    args.kept = request.integer(6);
    args.all_end = request.integer(7) != 0;
    args.early = request.integer(8) != 0;
    args.divisor = args.best_divisor = static_cast<float>(request.real(9));
    state.running = request.pointer<int64_t>(0);
    state.came_from = request.pointer<int32_t>(1);
    state.scores = request.pointer<float>(2);
    state.finished = request.pointer<int64_t>(3);
    state.finished_from = request.pointer<int32_t>(4);
    state.finished_scores = request.pointer<float>(5);
    state.finished_lengths = request.pointer<int64_t>(6);
    state.is_finished = request.pointer<uint8_t>(7);
    state.improvable = request.pointer<uint8_t>(8);
    args.value = request.pointer<const float>(9);
    args.beam = request.pointer<const int64_t>(10);
    args.token = request.pointer<const int64_t>(11);
    args.ends = request.pointer<const uint8_t>(12);
    args.end_tokens = request.pointer<const int64_t>(13);
    args.end_count = 1;
    args.parents = request.pointer<int64_t>(14);
    args.tokens = request.pointer<int64_t>(15);
    args.goes_on = request.pointer<bool>(16);
    return beam_extend(args);
}

Status run(const sim::Request& request) {
    if (request.function == "position") return position(request);
    if (request.function == "candidates") return candidates(request);
    if (request.function == "repeats") return repeats(request);
    if (request.function == "extend") return extend(request);
    return request.function == "logits" ? logits(request) : place(request);
}

}  // namespace
}  // namespace dqk

int main() {
    dqk::sim::serve(dqk::run);
}
