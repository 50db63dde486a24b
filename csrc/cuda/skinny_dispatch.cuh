// From sizes known at run time to the kernel compiled for them.
#pragma once
#include "cuda/skinny.cuh"
#include "cuda/skinny_launch.h"

namespace dqk {

template <int32_t kBits, int32_t kBytes, bool kGroups>
Status launch_tiles(const SkinnyGemm& args, const SkinnyShape& shape, void* stream) {
    Launch how;
    how.grid_x = static_cast<uint32_t>(shape.grid_x);
    how.grid_y = static_cast<uint32_t>(shape.splits);
    how.grid_z = static_cast<uint32_t>(shape.grid_z);
    how.threads = kSkinnyThreads;
    how.shared_bytes = static_cast<size_t>(shape.shared_bytes);
    how.stream = stream;
    how.overlap = args.overlap;
    switch (shape.tiles) {
        case 1:
            return launch(skinny_kernel<kBits, kBytes, 1, kGroups>, how, args, shape);
        case 2:
            return launch(skinny_kernel<kBits, kBytes, 2, kGroups>, how, args, shape);
        case 4:
            return launch(skinny_kernel<kBits, kBytes, 4, kGroups>, how, args, shape);
        default:
            return launch(skinny_kernel<kBits, kBytes, 8, kGroups>, how, args, shape);
    }
}

}  // namespace dqk
