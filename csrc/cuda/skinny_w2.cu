// The skinny GEMM's kernels for 2-bit weights.
#include "cuda/skinny_dispatch.cuh"

namespace dqk {

Status launch_skinny_w2(const SkinnyGemm& args, const SkinnyShape& shape, void* stream) {
    if (args.group_size == 0) return launch_tiles<2, 16, false>(args, shape, stream);
    return launch_tiles<2, 8, true>(args, shape, stream);
}

}  // namespace dqk
