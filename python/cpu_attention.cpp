// attention, attention_decode and cache_write: tuples of addresses, types and strides in, structs of api.h
// out.
#include "cpu_attention.h"

#include <pybind11/stl.h>

#include "checks.h"
#include "cpu_step.h"
#include "dqk/api.h"

namespace py = pybind11;

namespace dqk::binding {
namespace {

// Address of the codes, their strides, address of the scales, theirs.
using CacheArgument = std::tuple<uintptr_t, std::array<int64_t, 3>, uintptr_t, std::array<int64_t, 3>>;

Cache cache_of(const CacheArgument& given, bool needed, const char* where, const char* name) {
    const auto& [codes, stride, scale, scale_stride] = given;
    Cache cache = {};
    cache.codes = pointer<int8_t>(codes, 1, needed, where, name);
    cache.scale = pointer<float>(scale, 4, needed, where, name);
    for (int i = 0; i < 3; ++i) {
        cache.stride[i] = stride[i];
        cache.scale_stride[i] = scale_stride[i];
    }
    return cache;
}

AttentionSizes sizes_of(const std::array<int64_t, 5>& size, bool causal, float softmax_scale, int mode,
                        float clip, int threads, const char* where) {
    AttentionSizes sizes = {};
    sizes.batch = size[0];
    sizes.heads = size[1];
    sizes.queries = size[2];
    sizes.keys = size[3];
    sizes.head_dim = size[4];
    sizes.causal = causal;
    sizes.softmax_scale = softmax_scale;
    sizes.mode = mode_of(mode, where);
    sizes.clip = clip;
    sizes.threads = threads;
    return sizes;
}

void attention(const OperandArgument& q, const OperandArgument& k, const OperandArgument& v,
               const std::optional<OperandArgument>& mask, const std::optional<OperandArgument>& bias,
               uintptr_t out, const std::array<int64_t, 5>& sizes, bool causal, float softmax_scale, int mode,
               float clip, int threads) {
    const char* where = "attention";
    dqk::Attention args = {};
    args.sizes = sizes_of(sizes, causal, softmax_scale, mode, clip, threads, where);
    const bool any = sizes[0] > 0 && sizes[1] > 0 && sizes[2] > 0, seen = any && sizes[3] > 0;
    args.q = operand_of(q, false, any, where, "q_ptr");
    args.k = operand_of(k, false, seen, where, "k_ptr");
    args.v = operand_of(v, false, seen, where, "v_ptr");
    args.mask = operand_of(mask, true, seen, where, "mask_ptr");
    args.bias = operand_of(bias, false, seen, where, "bias_ptr");
    args.out = pointer<void>(out, element_bytes(args.q.dtype), any, where, "out_ptr");
    py::gil_scoped_release released;
    raise_unless_ok(dqk::attention(args), where);
}

void attention_decode(const OperandArgument& q, const CacheArgument& k, const CacheArgument& v,
                      int64_t caches, uintptr_t lengths, uintptr_t source, bool source_per_key,
                      const std::optional<OperandArgument>& bias, uintptr_t out,
                      const std::array<int64_t, 5>& sizes, bool causal, float softmax_scale, int mode,
                      float clip, int threads, DecoderStep* step) {
    const char* where = "attention_decode";
    dqk::AttentionDecode args = {};
    args.sizes = sizes_of(sizes, causal, softmax_scale, mode, clip, threads, where);
    const bool any = sizes[0] > 0 && sizes[1] > 0 && sizes[2] > 0, seen = any && sizes[3] > 0 && caches > 0;
    args.q = operand_of(q, false, any, where, "q_ptr");
    args.caches = caches;
    args.k = cache_of(k, seen, where, "k_cache");
    args.v = cache_of(v, seen, where, "v_cache");
    args.lengths = pointer<const int32_t>(lengths, 4, sizes[0] > 0, where, "lengths_ptr");
    args.source = pointer<const int32_t>(source, 4, false, where, "source_ptr");
    args.source_per_key = source_per_key;
    args.bias = operand_of(bias, false, seen, where, "bias_ptr");
    args.out = pointer<void>(out, element_bytes(args.q.dtype), any, where, "out_ptr");
    raise_unless_ok(run_or_add(args, dqk::attention_decode, step), where);
}

void cache_write(const OperandArgument& k, const OperandArgument& v, const CacheArgument& k_cache,
                 const CacheArgument& v_cache, int64_t caches, int64_t capacity, uintptr_t position,
                 const std::array<int64_t, 4>& sizes, int mode, float clip, int threads, DecoderStep* step) {
    const char* where = "cache_write";
    dqk::CacheWrite args = {};
    const bool any = sizes[0] > 0 && sizes[1] > 0 && sizes[2] > 0;
    args.k = operand_of(k, false, any, where, "k_ptr");
    args.v = operand_of(v, false, any, where, "v_ptr");
    args.batch = sizes[0];
    args.heads = sizes[1];
    args.tokens = sizes[2];
    args.head_dim = sizes[3];
    args.caches = caches;
    args.capacity = capacity;
    args.position = pointer<const int32_t>(position, 4, false, where, "position_ptr");
    args.mode = mode_of(mode, where);
    args.clip = clip;
    args.threads = threads;
    args.k_cache = cache_of(k_cache, any, where, "k_cache");
    args.v_cache = cache_of(v_cache, any, where, "v_cache");
    raise_unless_ok(run_or_add(args, dqk::cache_write, step), where);
}

}  // namespace

Operand operand_of(const std::optional<OperandArgument>& given, bool is_mask, bool needed, const char* where,
                   const char* name) {
    Operand operand = {};
    if (!given) return operand;
    const auto& [address, dtype, stride] = *given;
    operand.dtype = is_mask ? DType::int8 : dtype_of(dtype, where);
    operand.data = pointer<const void>(address, element_bytes(operand.dtype), needed, where, name);
    for (int i = 0; i < 4; ++i) operand.stride[i] = stride[i];
    return operand;
}

void define_cpu_attention(py::module_& m) {
    m.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask").none(true),
          py::arg("bias").none(true), py::arg("out_ptr"), py::arg("sizes"), py::arg("causal"),
          py::arg("softmax_scale"), py::arg("mode"), py::arg("clip"), py::arg("threads"),
          "int8 attention of float q, k, v: operands are (address, dtype, strides), sizes (batch, heads, "
          "queries, keys, head_dim).");
    m.def("attention_decode", &attention_decode, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
          py::arg("caches"), py::arg("lengths_ptr"), py::arg("source_ptr"), py::arg("source_per_key"),
          py::arg("bias").none(true), py::arg("out_ptr"), py::arg("sizes"), py::arg("causal"),
          py::arg("softmax_scale"), py::arg("mode"), py::arg("clip"), py::arg("threads"),
          py::arg("step").none(true) = nullptr,
          "The same over caches: (address of codes, strides, address of scales, strides).");
    m.def("cache_write", &cache_write, py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"),
          py::arg("caches"), py::arg("capacity"), py::arg("position_ptr"), py::arg("sizes"), py::arg("mode"),
          py::arg("clip"), py::arg("threads"), py::arg("step").none(true) = nullptr,
          "Quantizes new keys and values into caches; sizes (rows, heads, tokens, head_dim).");
}

}  // namespace dqk::binding
