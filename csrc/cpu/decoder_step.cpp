// See decoder_step.h.
#include "cpu/decoder_step.h"

namespace dqk {
namespace {

Status run_one(NormQuantize call, int32_t threads) {
    call.threads = threads;
    return norm_quantize(call);
}

Status run_one(CacheWrite call, int32_t threads) {
    call.threads = threads;
    return cache_write(call);
}

Status run_one(AttentionDecode call, int32_t threads) {
    call.sizes.threads = threads;
    return attention_decode(call);
}

}  // namespace

void DecoderStep::add(const CpuGemm& call) {
    Gemm kept = {};
    kept.call = call;
    for (int32_t i = 0; i < call.part_count && i < kMaxParts; ++i) kept.parts[i] = call.parts[i];
    calls_.emplace_back(kept);
}

Status DecoderStep::run(int32_t threads) const {
    Status status = Status::ok;
    for (const auto& each : calls_) {
        if (const Gemm* gemm = std::get_if<Gemm>(&each)) {
            CpuGemm call = gemm->call;
            call.parts = gemm->parts;
            call.threads = threads;
            status = cpu_gemm(call);
        } else if (const auto* norm = std::get_if<NormQuantize>(&each)) {
            status = run_one(*norm, threads);
        } else if (const auto* write = std::get_if<CacheWrite>(&each)) {
            status = run_one(*write, threads);
        } else if (const auto* attend = std::get_if<AttentionDecode>(&each)) {
            status = run_one(*attend, threads);
        }
        if (status != Status::ok) return status;
    }
    return status;
}

}  // namespace dqk
