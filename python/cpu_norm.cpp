// norm_quantize and gelu_quantize: addresses and sizes in, structs of api.h out.
#include "cpu_norm.h"

#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu_step.h"
#include "dqk/api.h"

namespace py = pybind11;

namespace dqk::binding {
namespace {

// Address, dtype code, row stride in elements (not read of a vector).
using RowsArgument = std::tuple<uintptr_t, int, int64_t>;
// Mode, clip, static scale, addresses of codes, scales and sums.
using CodesArgument = std::tuple<int, float, float, uintptr_t, uintptr_t, uintptr_t>;

struct Rows {
    const void* data = nullptr;
    DType dtype = DType::float32;
    int64_t stride = 0;
};

Rows rows_of(const std::optional<RowsArgument>& given, bool needed, const char* where, const char* name) {
    Rows rows;
    if (!given) return rows;
    const auto& [address, dtype, stride] = *given;
    rows.dtype = dtype_of(dtype, where);
    rows.data = pointer<const void>(address, element_bytes(rows.dtype), needed, where, name);
    rows.stride = stride;
    return rows;
}

QuantizeRows codes_of(const CodesArgument& given, const Rows& x, int64_t rows, int64_t k, const char* where) {
    const auto& [mode, clip, static_scale, q, scale, row_sum] = given;
    const bool needed = rows > 0;
    QuantizeRows args = {};
    args.x = x.data;
    args.dtype = x.dtype;
    args.rows = rows;
    args.k = k;
    args.row_stride = x.stride;
    args.mode = mode_of(mode, where);
    args.clip = clip;
    args.act_scale = static_scale;
    args.q = pointer<int8_t>(q, 1, needed, where, "q_ptr");
    args.scale = pointer<float>(scale, 4, needed, where, "scale_ptr");
    args.row_sum = pointer<int32_t>(row_sum, 4, false, where, "sum_ptr");
    return args;
}

void norm_quantize(const RowsArgument& x, const std::optional<RowsArgument>& residual,
                   const RowsArgument& weight, const std::optional<RowsArgument>& bias, double eps,
                   uintptr_t y, int64_t rows, int64_t k, const CodesArgument& codes, int threads,
                   DecoderStep* step) {
    const char* where = "norm_quantize";
    const bool needed = rows > 0;
    const Rows in = rows_of(x, needed, where, "x_ptr");
    const Rows added = rows_of(residual, needed, where, "residual_ptr");
    const Rows factor = rows_of(weight, needed, where, "weight_ptr");
    const Rows shift = rows_of(bias, needed, where, "bias_ptr");
    NormQuantize args = {};
    args.x = in.data;
    args.row_stride = in.stride;
    args.residual = added.data;
    args.residual_dtype = added.dtype;
    args.residual_stride = added.stride;
    args.weight = factor.data;
    args.weight_dtype = factor.dtype;
    args.bias = shift.data;
    args.bias_dtype = shift.dtype;
    args.eps = eps;
    args.y = pointer<void>(y, element_bytes(in.dtype), needed, where, "y_ptr");
    args.codes = codes_of(codes, in, rows, k, where);
    args.threads = threads;
    raise_unless_ok(run_or_add(args, dqk::norm_quantize, step), where);
}

void gelu_quantize(const RowsArgument& x, int64_t rows, int64_t k, const CodesArgument& codes, int threads) {
    const char* where = "gelu_quantize";
    const Rows in = rows_of(x, rows > 0, where, "x_ptr");
    const GeluQuantize args = {codes_of(codes, in, rows, k, where), threads};
    py::gil_scoped_release released;
    raise_unless_ok(dqk::gelu_quantize(args), where);
}

}  // namespace

void define_cpu_norm(py::module_& m) {
    m.def("norm_quantize", &norm_quantize, py::arg("x"), py::arg("residual").none(true), py::arg("weight"),
          py::arg("bias").none(true), py::arg("eps"), py::arg("y_ptr"), py::arg("rows"), py::arg("k"),
          py::arg("codes"), py::arg("threads"), py::arg("step").none(true) = nullptr,
          "LayerNorm of x (+ residual) and its int8 codes: operands are (address, dtype, row stride), codes "
          "(mode, "
          "clip, static scale, addresses of codes, scales and sums).");
    m.def("gelu_quantize", &gelu_quantize, py::arg("x"), py::arg("rows"), py::arg("k"), py::arg("codes"),
          py::arg("threads"), "The int8 codes of GELU of x.");
}

}  // namespace dqk::binding
