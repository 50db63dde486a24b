// The CPU GEMM in plain C++.
#define DQK_TARGET
#include "cpu/gemm_plain.h"

namespace dqk {

const GemmKernel& scalar_gemm() {
    static constexpr GemmKernel kernel = kernel_of<Plain<32>>("scalar");
    return kernel;
}

}  // namespace dqk
