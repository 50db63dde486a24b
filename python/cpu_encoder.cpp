// CpuEncoderLayer: the weights of a layer, checked once; each run brings its rows.
#include "cpu_encoder.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/encoder_layer.h"
#include "cpu_attention.h"
#include "cpu_gemm.h"

namespace py = pybind11;

namespace dqk::binding {
namespace {

constexpr const char* kWhere = "CpuEncoderLayer";

// Address and dtype code of the weight and of the bias, eps; mode, clip and static scale of the codes.
using NormArgument = std::tuple<uintptr_t, int, uintptr_t, int, double, int, float, float>;
// The plan, the static scale of its input, addresses of each part.
using LinearArgument = std::tuple<const CpuPlan*, float, std::vector<PartPointers>>;

class CpuEncoderLayer {
  public:
    CpuEncoderLayer(bool post_norm, const std::array<NormArgument, 2>& norms,
                    const std::array<LinearArgument, 4>& linears, int64_t heads, int64_t head_dim,
                    float softmax_scale, int mode, float clip) {
        layer_.post_norm = post_norm;
        for (size_t i = 0; i < 2; ++i) {
            const auto& [weight, dtype, bias, bias_dtype, eps, how, norm_clip, scale] = norms[i];
            LayerNorm& norm = layer_.norms[i];
            norm.weight_dtype = dtype_of(dtype, kWhere);
            norm.weight =
                pointer<const void>(weight, element_bytes(norm.weight_dtype), true, kWhere, "norm's weight");
            norm.bias_dtype = dtype_of(bias_dtype, kWhere);
            norm.bias =
                pointer<const void>(bias, element_bytes(norm.bias_dtype), false, kWhere, "norm's bias");
            norm.eps = eps;
            layer_.mode[i] = mode_of(how, kWhere);
            layer_.clip[i] = norm_clip;
            layer_.static_scale[i] = scale;
        }
        KeptLinears* const kept[4] = {&layer_.qkv, &layer_.out, &layer_.up, &layer_.down};
        for (size_t i = 0; i < 4; ++i) {
            const auto& [plan, static_scale, pointers] = linears[i];
            if (plan == nullptr) raise_unless_ok(Status::bad_cpu_part, kWhere);
            kept[i]->call = plan->call(pointers, false, kept[i]->parts, kMaxParts);
            kept[i]->call.parts = nullptr;  // each run has its own
            kept[i]->call.static_scale = static_scale;
        }
        layer_.heads = heads;
        layer_.head_dim = head_dim;
        layer_.softmax_scale = softmax_scale;
        layer_.attention_mode = mode_of(mode, kWhere);
        layer_.attention_clip = clip;
    }

    void run(uintptr_t x, uintptr_t y, int64_t batch, int64_t tokens,
             const std::optional<OperandArgument>& mask, const std::optional<OperandArgument>& bias,
             int32_t threads) const {
        const bool needed = batch > 0 && tokens > 0;
        const int64_t bytes = element_bytes(layer_.qkv.call.y_dtype);
        EncoderRows rows = {};
        rows.x = pointer<const void>(x, bytes, needed, kWhere, "x");
        rows.y = pointer<void>(y, bytes, needed, kWhere, "y");
        rows.batch = batch;
        rows.tokens = tokens;
        rows.mask = operand_of(mask, true, needed, kWhere, "mask");
        rows.bias = operand_of(bias, false, needed, kWhere, "bias");
        rows.threads = threads;
        Status status = Status::ok;
        {
            py::gil_scoped_release released;
            status = encoder_layer(layer_, rows);
        }
        raise_unless_ok(status == Status::out_of_memory ? Status::no_memory : status, kWhere);
    }

  private:
    EncoderLayer layer_ = {};
};

}  // namespace

void define_cpu_encoder(py::module_& m) {
    py::class_<CpuEncoderLayer>(
        m, "CpuEncoderLayer", py::module_local(),
        "A layer of an encoder: its weights, whose memory must stay; `run` computes it for any rows.")
        .def(py::init<bool, const std::array<NormArgument, 2>&, const std::array<LinearArgument, 4>&, int64_t,
                      int64_t, float, int, float>(),
             py::kw_only(), py::arg("post_norm"), py::arg("norms"), py::arg("linears"), py::arg("heads"),
             py::arg("head_dim"), py::arg("softmax_scale"), py::arg("mode"), py::arg("clip"))
        .def("run", &CpuEncoderLayer::run, py::arg("x"), py::arg("y"), py::arg("batch"), py::arg("tokens"),
             py::arg("mask").none(true), py::arg("bias").none(true), py::arg("threads"),
             "[batch, tokens, width] -> the same, without the interpreter's lock.");
}

}  // namespace dqk::binding
