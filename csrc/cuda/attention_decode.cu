// Decode attention's kernels, and which of them runs.
#include "cuda/attention_decode.cuh"

namespace dqk {
namespace {

constexpr int32_t kAmaxThreads = 256;

// amax[block] = the largest magnitude of the block's vectors, NaN and Inf on top.
__global__ void __launch_bounds__(kAmaxThreads)
    attention_amax_kernel(const __grid_constant__ CudaAttentionDecode args) {
    DQK_SHARED(uint32_t, best_of_warp, kAmaxThreads / 32);
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32,
                  warp = static_cast<int32_t>(threadIdx.x) / 32;
    const int64_t vectors = args.rows * args.heads * args.queries;
    uint32_t best = 0;
    for (int64_t i = int64_t{blockIdx.x} * (kAmaxThreads / 32) + warp; i < vectors;
         i += int64_t{gridDim.x} * (kAmaxThreads / 32)) {
        const int64_t row = i / args.queries;  // and head
        const int64_t start = query_start(args, row / args.heads, row % args.heads, i % args.queries);
        for (int32_t d = lane; d < args.head_dim; d += 32)
            best = larger(best, magnitude_bits(query_element(args, start + d)));
    }
    best = warp_max(best);
    if (lane == 0) best_of_warp[warp] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int32_t i = 1; i < kAmaxThreads / 32; ++i) best = larger(best, best_of_warp[i]);
    static_cast<uint32_t*>(args.workspace)[blockIdx.x] = best;
}

// One launch, or one for the maxima of all splits and one for the sums.
template <int32_t kSegments, int32_t kTiles, bool kVector>
Status launch_parts(const CudaAttentionDecode& args, const AttentionShape& shape, const Launch& how) {
    const auto kernel = attention_decode_kernel<kSegments, kTiles, kVector, false>;
    if (shape.splits == 1) return launch(kernel, how, args, shape, AttentionPart::both);
    const Status status = launch(kernel, how, args, shape, AttentionPart::scores);
    return status == Status::ok ? launch(kernel, how, args, shape, AttentionPart::values) : status;
}

template <int32_t kSegments, int32_t kTiles>
Status launch_form(const CudaAttentionDecode& args, const AttentionShape& shape, const Launch& how) {
    if (shape.keep)
        return launch(attention_decode_kernel<kSegments, kTiles, true, true>, how, args, shape,
                      AttentionPart::both);
    return launch_parts<kSegments, kTiles, true>(args, shape, how);
}

}  // namespace

Status launch_attention_decode(const CudaAttentionDecode& args, const AttentionShape& shape, void* stream) {
    Launch how;
    how.stream = stream;
    if (shape.amax_blocks > 0) {
        how.grid_x = static_cast<uint32_t>(shape.amax_blocks);
        how.threads = kAmaxThreads;
        const Status status = launch(attention_amax_kernel, how, args);
        if (status != Status::ok) return status;
    }
    how.grid_x = static_cast<uint32_t>(shape.groups * args.heads);
    how.grid_y = static_cast<uint32_t>(shape.splits);
    how.threads = static_cast<uint32_t>(32 * shape.warps);
    how.shared_bytes = static_cast<size_t>(shape.shared_bytes);
    if (!shape.vector) return launch_parts<2, 1, false>(args, shape, how);
    if (shape.segments == 1)
        return shape.tiles == 1 ? launch_form<1, 1>(args, shape, how) : launch_form<1, 2>(args, shape, how);
    return shape.tiles == 1 ? launch_form<2, 1>(args, shape, how) : launch_form<2, 2>(args, shape, how);
}

}  // namespace dqk
