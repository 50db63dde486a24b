// cuda_quantize_rows on the simulator, called as the binding calls it.
#include "dqk/api.h"
#include "protocol.h"

namespace {

// scalars: rows, k, row_stride, dtype, mode, clip, act_scale. buffers: x, q, scale, row_sum, act_scale on the
// device.
dqk::Status run(const dqk::sim::Request& request) {
    dqk::QuantizeRows args = {};
    args.rows = request.integer(0);
    args.k = request.integer(1);
    args.row_stride = request.integer(2);
    args.dtype = static_cast<dqk::DType>(request.integer(3));
    args.mode = static_cast<dqk::ActMode>(request.integer(4));
    args.clip = static_cast<float>(request.real(5));
    args.act_scale = static_cast<float>(request.real(6));
    args.x = request.pointer<const void>(0);
    args.q = request.pointer<int8_t>(1);
    args.scale = request.pointer<float>(2);
    args.row_sum = request.pointer<int32_t>(3);
    return dqk::cuda_quantize_rows(args, request.pointer<const float>(4), nullptr);
}

}  // namespace

int main() {
    dqk::sim::serve(run);
}
