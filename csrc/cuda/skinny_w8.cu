// The skinny GEMM's kernels for 8-bit weights.
#include "cuda/skinny_dispatch.cuh"

namespace dqk {

Status launch_skinny_w8(const SkinnyGemm& args, const SkinnyShape& shape, void* stream) {
    return launch_tiles<8, 16, false>(args, shape, stream);
}

}  // namespace dqk
