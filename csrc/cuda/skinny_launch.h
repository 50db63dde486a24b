// One launcher per width, each in a file of its own so that they compile side by side.
#pragma once
#include "dqk/api.h"
#include "dqk/skinny_shape.h"

namespace dqk {

Status launch_skinny_w2(const SkinnyGemm& args, const SkinnyShape& shape, void* stream);
Status launch_skinny_w4(const SkinnyGemm& args, const SkinnyShape& shape, void* stream);
Status launch_skinny_w8(const SkinnyGemm& args, const SkinnyShape& shape, void* stream);

}  // namespace dqk
