// A call of the row quantizer as the tests send it: the same to every host program.
#pragma once
#include "dqk/api.h"
#include "protocol.h"

namespace dqk::sim {

// scalars: rows, k, row_stride, dtype, mode, clip, act_scale. buffers: x, q, scale, row_sum.
inline QuantizeRows quantize_request(const Request& request) {
    QuantizeRows args = {};
    args.rows = request.integer(0);
    args.k = request.integer(1);
    args.row_stride = request.integer(2);
    args.dtype = static_cast<DType>(request.integer(3));
    args.mode = static_cast<ActMode>(request.integer(4));
    args.clip = static_cast<float>(request.real(5));
    args.act_scale = static_cast<float>(request.real(6));
    args.x = request.pointer<const void>(0);
    args.q = request.pointer<int8_t>(1);
    args.scale = request.pointer<float>(2);
    args.row_sum = request.pointer<int32_t>(3);
    return args;
}

}  // namespace dqk::sim
