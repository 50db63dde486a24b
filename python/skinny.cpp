// SkinnyPlan: the sizes and options of one kind of call, checked once; each call then brings its addresses.
#include "skinny.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "checks.h"
#include "dqk/api.h"

namespace py = pybind11;

namespace dqk::binding {
namespace {

constexpr const char* kWhere = "skinny_gemm";

// qweight, weight_scale, group_mult, bias, residual, y
using PartPointers = std::array<uintptr_t, 6>;

class SkinnyPlan {
  public:
    SkinnyPlan(int64_t m, int64_t k, int64_t row_stride, int x_dtype, int mode, float clip, float norm_eps,
               int bits, bool four_level, int group_size, bool tensor_scale, int bias_dtype,
               int residual_dtype, int activation, int y_dtype, const std::vector<int64_t>& n, int warps_n,
               int splits, int sms, bool overlap) {
        if (n.empty() || n.size() > kMaxParts) raise_unless_ok(Status::bad_part, kWhere);
        args_.m = m;
        args_.k = k;
        args_.row_stride = row_stride;
        args_.x_dtype = static_cast<DType>(x_dtype);
        args_.mode = mode_of(mode, kWhere);
        args_.clip = clip;
        args_.norm_eps = norm_eps;
        args_.bits = bits;
        args_.four_level = four_level;
        args_.group_size = group_size;
        args_.tensor_scale = tensor_scale;
        args_.bias_dtype = dtype_of(bias_dtype, kWhere);
        args_.residual_dtype = dtype_of(residual_dtype, kWhere);
        args_.activation = static_cast<Activation>(activation);
        args_.y_dtype = static_cast<DType>(y_dtype);
        args_.part_count = static_cast<int32_t>(n.size());
        for (size_t i = 0; i < n.size(); ++i) args_.parts[i].n = n[i];
        args_.warps_n = warps_n;
        args_.splits = splits;
        args_.sms = sms;
        args_.overlap = overlap;
        raise_unless_ok(skinny_memory(args_, &memory_), kWhere);
        args_.warps_n = memory_.warps_n;
        args_.splits = memory_.splits;
    }

    void run(uintptr_t x, uintptr_t act_scale, uintptr_t norm_weight, uintptr_t norm_bias, uintptr_t norm_y,
             uintptr_t out_scale, const std::vector<PartPointers>& parts, uintptr_t workspace,
             uintptr_t counters, uintptr_t stream) const {
        SkinnyGemm args = args_;
        if (args.m == 0) return;
        const auto x_bytes = static_cast<uintptr_t>(element_bytes(args.x_dtype));
        args.x = pointer<const void>(x, x_bytes, true, kWhere, "x");
        args.act_scale = pointer<const float>(act_scale, 4, false, kWhere, "act_scale");
        args.norm_weight = pointer<const void>(norm_weight, x_bytes, false, kWhere, "norm_weight");
        args.norm_bias = pointer<const void>(norm_bias, x_bytes, false, kWhere, "norm_bias");
        args.norm_y = pointer<void>(norm_y, x_bytes, norm_weight != 0, kWhere, "norm_y");
        args.out_scale = pointer<const float>(out_scale, 4, false, kWhere, "out_scale");
        args.workspace = pointer<int32_t>(workspace, 4, memory_.workspace_bytes > 0, kWhere, "workspace");
        args.counters = pointer<uint32_t>(counters, 4, memory_.counter_bytes > 0, kWhere, "counters");
        if (parts.size() != static_cast<size_t>(args.part_count)) raise_unless_ok(Status::bad_part, kWhere);
        for (size_t i = 0; i < parts.size(); ++i) {
            SkinnyPart& part = args.parts[i];
            part.qweight = pointer<const uint8_t>(parts[i][0], 16, true, kWhere, "qweight");
            part.weight_scale = pointer<const float>(parts[i][1], 4, true, kWhere, "weight_scale");
            part.group_mult =
                pointer<const uint8_t>(parts[i][2], 1, args.group_size != 0, kWhere, "group_mult");
            part.bias =
                pointer<const void>(parts[i][3], element_bytes(args.bias_dtype), false, kWhere, "bias");
            part.residual = pointer<const void>(parts[i][4], element_bytes(args.residual_dtype), false,
                                                kWhere, "residual");
            part.y = pointer<void>(parts[i][5], element_bytes(args.y_dtype), true, kWhere, "y");
        }
        py::gil_scoped_release released;
        raise_unless_ok(cuda_skinny_gemm(args, reinterpret_cast<void*>(stream)), kWhere);
    }

    int64_t workspace_bytes() const { return memory_.workspace_bytes; }
    int64_t counter_bytes() const { return memory_.counter_bytes; }
    int32_t warps_n() const { return memory_.warps_n; }
    int32_t splits() const { return memory_.splits; }

  private:
    SkinnyGemm args_ = {};
    SkinnyMemory memory_ = {};
};

}  // namespace

void define_skinny(py::module_& m) {
    py::class_<SkinnyPlan>(m, "SkinnyPlan",
                           "Sizes and options of a skinny GEMM; `run` queues it on a stream.")
        .def(py::init<int64_t, int64_t, int64_t, int, int, float, float, int, bool, int, bool, int, int, int,
                      int, const std::vector<int64_t>&, int, int, int, bool>(),
             py::kw_only(), py::arg("m"), py::arg("k"), py::arg("row_stride"), py::arg("x_dtype"),
             py::arg("mode"), py::arg("clip"), py::arg("norm_eps"), py::arg("bits"), py::arg("four_level"),
             py::arg("group_size"), py::arg("tensor_scale"), py::arg("bias_dtype"), py::arg("residual_dtype"),
             py::arg("activation"), py::arg("y_dtype"), py::arg("n"), py::arg("warps_n"), py::arg("splits"),
             py::arg("sms"), py::arg("overlap"))
        .def("run", &SkinnyPlan::run, py::arg("x"), py::arg("act_scale"), py::arg("norm_weight"),
             py::arg("norm_bias"), py::arg("norm_y"), py::arg("out_scale"), py::arg("parts"),
             py::arg("workspace"), py::arg("counters"), py::arg("stream"))
        .def_property_readonly("workspace_bytes", &SkinnyPlan::workspace_bytes)
        .def_property_readonly("counter_bytes", &SkinnyPlan::counter_bytes)
        .def_property_readonly("warps_n", &SkinnyPlan::warps_n)
        .def_property_readonly("splits", &SkinnyPlan::splits);
}

}  // namespace dqk::binding
