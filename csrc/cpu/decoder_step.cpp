// See decoder_step.h.
#include "cpu/decoder_step.h"

#include "cpu/gemm_loops.h"
#include "cpu/threads.h"

namespace dqk {
namespace {

// What a run decides for its calls.
struct Run {
    int32_t threads;
    bool wants_best;

    Status operator()(NormQuantize call) const {
        call.threads = threads;
        return norm_quantize(call);
    }
    Status operator()(CacheWrite call) const {
        call.threads = threads;
        return cache_write(call);
    }
    Status operator()(AttentionDecode call) const {
        call.sizes.threads = threads;
        return attention_decode(call);
    }
    Status operator()(CpuEmbedding call) const {
        call.threads = threads;
        return cpu_embedding(call);
    }
    Status operator()(const AddPosition& call) const { return add_position(call); }
    Status operator()(FinishLogits call) const {
        call.threads = threads;
        if (!wants_best) call.best = nullptr;
        return finish_logits(call);
    }
    template <typename Gemm>
    Status operator()(const Gemm& kept) const {
        CpuGemm call = kept.call;
        call.parts = kept.parts;
        call.threads = threads;
        return cpu_gemm(call);
    }
};

}  // namespace

Status DecoderStep::add(const CpuGemm& call) {
    if (call.part_count > kMaxParts) return Status::bad_cpu_part;
    Gemm kept = {};
    kept.call = call;
    for (int32_t i = 0; i < call.part_count; ++i) kept.parts[i] = call.parts[i];
    calls_.emplace_back(kept);
    shares_ = shares_ || worth_sharing(call);
    return Status::ok;
}

Status DecoderStep::place(const int64_t* tokens, int64_t position) const {
    if (position < 0 || position >= rows_.capacity) return Status::bad_keys;
    for (int64_t r = 0; r < rows_.rows; ++r) {
        rows_.tokens[r] = tokens[r];
        rows_.positions[r] = static_cast<int32_t>(position);
        rows_.lengths[r] = static_cast<int32_t>(position + 1);
        if (rows_.ancestors != nullptr)
            rows_.ancestors[r * rows_.capacity + position] = static_cast<int32_t>(r);
    }
    return Status::ok;
}

Status DecoderStep::run(int32_t threads, bool wants_best) const {
    const Run one = {threads, wants_best};
    Status status = Status::ok;
    together(shares_ ? threads : 1, [&] {
        for (const auto& each : calls_) {
            status = std::visit(one, each);
            if (status != Status::ok) return;
        }
    });
    return status;
}

}  // namespace dqk
