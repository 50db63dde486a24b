// The skinny GEMM's kernels for 4-bit weights.
#include "cuda/skinny_dispatch.cuh"

namespace dqk {

Status launch_skinny_w4(const SkinnyGemm& args, const SkinnyShape& shape, void* stream) {
    if (args.group_size == 0) return launch_tiles<4, 16, false>(args, shape, stream);
    if (shape.lane == 16) return launch_tiles<4, 16, true>(args, shape, stream);
    return launch_tiles<4, 8, true>(args, shape, stream);
}

}  // namespace dqk
