// The CPU GEMM's part of the extension module.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <vector>

#include "cpu/decoder_step.h"
#include "dqk/api.h"

namespace dqk::binding {

// qweight, weight_scale, group_mult, bias, residual, y
using PartPointers = std::array<uintptr_t, 6>;

// The options of one kind of linear, checked once; each call then brings its sizes and addresses.
class CpuPlan {
  public:
    CpuPlan(int64_t k, int x_dtype, int mode, float clip, int bits, bool four_level, int group_size,
            int activation, int y_dtype, const std::vector<int64_t>& n, const std::vector<bool>& tensor_scale,
            const std::vector<int>& bias_dtype, const std::vector<int>& residual_dtype, int kernel);

    // A call whose `parts` (`room` of them) have these addresses. has_rows: y may not be nullptr.
    CpuGemm call(const std::vector<PartPointers>& pointers, bool has_rows, CpuPart* parts,
                 int32_t room) const;

    void run(int64_t m, int64_t row_stride, uintptr_t x, uintptr_t act_scale, float static_scale,
             int32_t threads, const std::vector<PartPointers>& pointers, DecoderStep* step) const;

  private:
    CpuGemm args_ = {};
    std::vector<CpuPart> parts_;
};

void define_cpu_gemm(pybind11::module_& m);

}  // namespace dqk::binding
