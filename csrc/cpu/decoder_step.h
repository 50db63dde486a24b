// A decode step on a CPU as one call: the core's calls of all layers, with their addresses, in the order in
// which they run. It is written down once per set of caches; what changes from token to token stands behind
// the addresses (the input, positions, lengths, the table of ancestors).
//
// It computes nothing itself, so a step has the bits of its calls made one by one.
#pragma once
#include <cstdint>
#include <variant>
#include <vector>

#include "dqk/api.h"

namespace dqk {

class DecoderStep {
  public:
    // Appends a call. Its threads are not read: `run` says how many. The parts of a GEMM are copied, nothing
    // else is: every operand must stay where it is.
    void add(const CpuGemm& call);
    void add(const NormQuantize& call) { calls_.emplace_back(call); }
    void add(const CacheWrite& call) { calls_.emplace_back(call); }
    void add(const AttentionDecode& call) { calls_.emplace_back(call); }

    int64_t size() const { return static_cast<int64_t>(calls_.size()); }

    // All calls, up to the first that fails.
    Status run(int32_t threads) const;

  private:
    struct Gemm {
        CpuGemm call;
        CpuPart parts[kMaxParts];
    };
    std::vector<std::variant<Gemm, NormQuantize, CacheWrite, AttentionDecode>> calls_;
};

}  // namespace dqk
