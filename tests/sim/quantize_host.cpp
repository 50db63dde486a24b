// cuda_quantize_rows on the simulator, called as the binding calls it.
#include "quantize_request.h"

namespace {

// quantize_request.h, and a buffer: act_scale on the device.
dqk::Status run(const dqk::sim::Request& request) {
    const dqk::QuantizeRows args = dqk::sim::quantize_request(request);
    return dqk::cuda_quantize_rows(args, request.pointer<const float>(4), nullptr);
}

}  // namespace

int main() {
    dqk::sim::serve(run);
}
