// A decode step on a CPU as one call: the core's calls of all layers, with their addresses, in the order in
// which they run. It is written down once per set of caches; what changes from token to token stands behind
// the addresses (the tokens, positions, lengths, the table of ancestors).
//
// It computes nothing itself, so a step has the bits of its calls made one by one.
#pragma once
#include <cstdint>
#include <variant>
#include <vector>

#include "dqk/api.h"

namespace dqk {

// The small tensors that say where a step is.
struct StepRows {
    int64_t rows;
    int64_t capacity;    // positions that the caches have room for
    int64_t* tokens;     // [rows]
    int32_t* positions;  // [rows]
    int32_t* lengths;    // [rows], positions + 1
    int32_t* ancestors;  // [rows, capacity], or nullptr: row r of the new position is r
};

class DecoderStep {
  public:
    // Appends a call. Its threads are not read: `run` says how many. The parts of a GEMM (kMaxParts at most)
    // are copied, nothing else is: every operand must stay where it is.
    Status add(const CpuGemm& call);
    template <typename Call>
    Status add(const Call& call) {
        calls_.emplace_back(call);
        return Status::ok;
    }

    int64_t size() const { return static_cast<int64_t>(calls_.size()); }

    // What `place` writes from now on.
    void set_rows(const StepRows& rows) { rows_ = rows; }

    // One more token per row, all at `position`; refused where there is no room for them, or no rows are set.
    Status place(const int64_t* tokens, int64_t position) const;

    // All calls, up to the first that fails. wants_best: FinishLogits finds the largest.
    Status run(int32_t threads, bool wants_best) const;

  private:
    struct Gemm {
        CpuGemm call;
        CpuPart parts[kMaxParts];
    };
    std::vector<std::variant<Gemm, NormQuantize, CacheWrite, AttentionDecode, CpuEmbedding, AddPosition,
                             FinishLogits>>
        calls_;
    StepRows rows_ = {};
    // A call of it is worth more than one thread: a small step leaves the others asleep.
    bool shares_ = false;
};

}  // namespace dqk
