// AttentionPlan: the sizes and options of one kind of call, checked once; each call then brings its
// addresses.
#include "cuda_attention.h"

#include <pybind11/stl.h>

#include <array>

#include "checks.h"
#include "dqk/api.h"

namespace py = pybind11;

namespace dqk::binding {
namespace {

constexpr const char* kWhere = "attention_decode";

class AttentionPlan {
  public:
    AttentionPlan(int dtype, int64_t rows, int64_t heads, int64_t queries, int64_t head_dim, int64_t caches,
                  int64_t capacity, const std::array<int64_t, 3>& q_stride, bool aligned, bool shared,
                  bool by_key, int bias_dtype, const std::array<int64_t, 4>& bias_stride, bool causal,
                  float softmax_scale, int mode, float clip, int form, int splits, int warps, int sms) {
        args_.dtype = dtype_of(dtype, kWhere);
        args_.rows = rows;
        args_.heads = heads;
        args_.queries = queries;
        args_.head_dim = head_dim;
        args_.caches = caches;
        args_.capacity = capacity;
        for (size_t i = 0; i < 3; ++i) args_.q_stride[i] = q_stride[i];
        args_.aligned = aligned;
        args_.shared = shared;
        args_.by_key = by_key;
        args_.bias_dtype = dtype_of(bias_dtype, kWhere);
        for (size_t i = 0; i < 4; ++i) args_.bias_stride[i] = bias_stride[i];
        args_.causal = causal;
        args_.softmax_scale = softmax_scale;
        args_.mode = mode_of(mode, kWhere);
        args_.clip = clip;
        args_.form = static_cast<AttentionForm>(form);
        args_.splits = splits;
        args_.warps = warps;
        args_.sms = sms;
        raise_unless_ok(attention_memory(args_, &memory_), kWhere);
    }

    void run(uintptr_t q, uintptr_t k, uintptr_t k_scale, uintptr_t v, uintptr_t v_scale, uintptr_t lengths,
             uintptr_t source, uintptr_t bias, uintptr_t out, uintptr_t workspace, uintptr_t counters,
             uintptr_t stream) const {
        CudaAttentionDecode args = args_;
        const auto bytes = static_cast<uintptr_t>(element_bytes(args.dtype));
        const uintptr_t row = args.aligned ? 16 : 4;
        args.q = pointer<const void>(q, bytes, true, kWhere, "q");
        args.k = pointer<const int8_t>(k, row, true, kWhere, "k_cache");
        args.k_scale = pointer<const float>(k_scale, 4, true, kWhere, "k_scale");
        args.v = pointer<const int8_t>(v, row, true, kWhere, "v_cache");
        args.v_scale = pointer<const float>(v_scale, 4, true, kWhere, "v_scale");
        args.lengths = pointer<const int32_t>(lengths, 4, true, kWhere, "lengths");
        args.source = pointer<const int32_t>(source, 4, args.shared || args.by_key, kWhere, "source");
        args.bias = pointer<const void>(bias, element_bytes(args.bias_dtype), false, kWhere, "bias");
        args.out = pointer<void>(out, bytes, true, kWhere, "out");
        args.workspace = pointer<void>(workspace, 8, memory_.workspace_bytes > 0, kWhere, "workspace");
        args.counters = pointer<uint32_t>(counters, 4, memory_.counter_bytes > 0, kWhere, "counters");
        py::gil_scoped_release released;
        raise_unless_ok(cuda_attention_decode(args, reinterpret_cast<void*>(stream)), kWhere);
    }

    int64_t workspace_bytes() const { return memory_.workspace_bytes; }
    int64_t counter_bytes() const { return memory_.counter_bytes; }
    int32_t splits() const { return memory_.splits; }
    int32_t warps() const { return memory_.warps; }

  private:
    CudaAttentionDecode args_ = {};
    AttentionMemory memory_ = {};
};

}  // namespace

void define_cuda_attention(py::module_& m) {
    py::class_<AttentionPlan>(m, "AttentionPlan",
                              "Sizes and options of decode attention; `run` queues it on a stream.")
        .def(py::init<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                      const std::array<int64_t, 3>&, bool, bool, bool, int, const std::array<int64_t, 4>&,
                      bool, float, int, float, int, int, int, int>(),
             py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("heads"), py::arg("queries"),
             py::arg("head_dim"), py::arg("caches"), py::arg("capacity"), py::arg("q_stride"),
             py::arg("aligned"), py::arg("shared"), py::arg("by_key"), py::arg("bias_dtype"),
             py::arg("bias_stride"), py::arg("causal"), py::arg("softmax_scale"), py::arg("mode"),
             py::arg("clip"), py::arg("form"), py::arg("splits"), py::arg("warps"), py::arg("sms"))
        .def("run", &AttentionPlan::run, py::arg("q"), py::arg("k"), py::arg("k_scale"), py::arg("v"),
             py::arg("v_scale"), py::arg("lengths"), py::arg("source"), py::arg("bias"), py::arg("out"),
             py::arg("workspace"), py::arg("counters"), py::arg("stream"))
        .def_property_readonly("workspace_bytes", &AttentionPlan::workspace_bytes)
        .def_property_readonly("counter_bytes", &AttentionPlan::counter_bytes)
        .def_property_readonly("splits", &AttentionPlan::splits)
        .def_property_readonly("warps", &AttentionPlan::warps);
}

}  // namespace dqk::binding
