// The extension module dqkernels._C: addresses and sizes in, Status out as an exception. Nothing computes
// here, and no Python file belongs into this folder: the package is the top-level `dqkernels/`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "build_config.h"  // written by CMake: how this binary was compiled
#include "checks.h"
#include "cpu_attention.h"
#include "cpu_beams.h"
#include "cpu_encoder.h"
#include "cpu_gemm.h"
#include "cpu_norm.h"
#include "cpu_step.h"
#include "cuda_attention.h"
#include "dqk/api.h"
#include "dqk/format.h"
#include "skinny.h"

namespace py = pybind11;
using dqk::binding::pointer;
using dqk::binding::raise_unless_ok;

namespace {

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (int32_t i = 0; i < dqk::kIsaCount; ++i) {
        const auto isa = static_cast<dqk::Isa>(i);
        if (dqk::isa_supported(isa)) names.emplace_back(dqk::isa_name(isa));
    }
    return names;
}

std::string cpu_isa() {
    dqk::Isa isa = dqk::Isa::scalar;
    const dqk::Status status = dqk::active_isa(&isa);
    if (status == dqk::Status::ok) return dqk::isa_name(isa);
    const char* found = std::getenv("DQKERNELS_CPU");
    std::string text =
        std::string("DQKERNELS_CPU=") + (found == nullptr ? "" : found) + ": " + dqk::sentence(status);
    text += "; this CPU has";
    for (const std::string& name : cpu_isas()) text += " " + name;
    throw std::invalid_argument(text);
}

py::dict build_info() {
    py::dict info;
    info["abi_version"] = dqk::kAbiVersion;
    info["format_version"] = dqk::kFormatVersion;
    info["compiler"] = DQK_BUILD_COMPILER;
    info["flags"] = DQK_BUILD_FLAGS;
    info["cuda"] = static_cast<bool>(DQK_BUILD_CUDA);
    info["cuda_compiler"] = DQK_BUILD_CUDA_COMPILER;
    info["cuda_flags"] = DQK_BUILD_CUDA_FLAGS;
    info["cuda_archs"] = DQK_BUILD_CUDA_ARCHS;
    return info;
}

void pack(uintptr_t codes, int64_t n, int64_t k, int bits, uintptr_t out) {
    const bool needed = n > 0;
    raise_unless_ok(dqk::pack(pointer<const int8_t>(codes, 1, needed, "pack", "codes_ptr"), n, k, bits,
                              pointer<uint8_t>(out, 1, needed, "pack", "out_ptr")),
                    "pack");
}

void unpack(uintptr_t packed, int64_t n, int64_t k, int bits, uintptr_t out) {
    const bool needed = n > 0;
    raise_unless_ok(dqk::unpack(pointer<const uint8_t>(packed, 1, needed, "unpack", "packed_ptr"), n, k, bits,
                                pointer<int8_t>(out, 1, needed, "unpack", "out_ptr")),
                    "unpack");
}

dqk::QuantizeRows quantize_args(const char* where, uintptr_t x, int dtype, int64_t rows, int64_t k,
                                int64_t row_stride, int mode, float clip, float act_scale, uintptr_t q,
                                uintptr_t scale, uintptr_t row_sum) {
    const bool needed = rows > 0;
    dqk::QuantizeRows args = {};
    args.dtype = dqk::binding::dtype_of(dtype, where);
    args.mode = dqk::binding::mode_of(mode, where);
    args.x = pointer<const void>(x, dqk::element_bytes(args.dtype), needed, where, "x_ptr");
    args.rows = rows;
    args.k = k;
    args.row_stride = row_stride;
    args.clip = clip;
    args.act_scale = act_scale;
    args.q = pointer<int8_t>(q, 1, needed, where, "q_ptr");
    args.scale = pointer<float>(scale, 4, needed, where, "scale_ptr");
    args.row_sum = pointer<int32_t>(row_sum, 4, false, where, "sum_ptr");
    return args;
}

void quantize_rows(uintptr_t x, int dtype, int64_t rows, int64_t k, int64_t row_stride, int mode, float clip,
                   float act_scale, uintptr_t q, uintptr_t scale, uintptr_t row_sum) {
    raise_unless_ok(dqk::quantize_rows(quantize_args("quantize_rows", x, dtype, rows, k, row_stride, mode,
                                                     clip, act_scale, q, scale, row_sum)),
                    "quantize_rows");
}

#if DQK_BUILD_CUDA
void cuda_quantize_rows(uintptr_t x, int dtype, int64_t rows, int64_t k, int64_t row_stride, int mode,
                        float clip, float act_scale, uintptr_t q, uintptr_t scale, uintptr_t row_sum,
                        uintptr_t stream, uintptr_t static_scale) {
    raise_unless_ok(dqk::cuda_quantize_rows(quantize_args("cuda_quantize_rows", x, dtype, rows, k, row_stride,
                                                          mode, clip, act_scale, q, scale, row_sum),
                                            pointer<const float>(static_scale, 4, false, "cuda_quantize_rows",
                                                                 "static_scale_ptr"),
                                            reinterpret_cast<void*>(stream)),
                    "cuda_quantize_rows");
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    using no_gil = py::call_guard<py::gil_scoped_release>;
    m.doc() =
        "Native kernels of dqkernels. Call them through dqkernels.kernels.native, which checks tensors.";

    m.def("abi_version", [] { return dqk::kAbiVersion; });
    m.def("build_info", &build_info, "How this binary was compiled.");
    m.def("cpu_isa", &cpu_isa, "The instruction set in use: $DQKERNELS_CPU, else the best one here.");
    m.def("cpu_isas", &cpu_isas, "The instruction sets this CPU and this build have.");

    m.def("pack", &pack, no_gil(), py::arg("codes_ptr"), py::arg("n"), py::arg("k"), py::arg("bits"),
          py::arg("out_ptr"), "int8 codes [n, k] -> packed uint8 [ceil16(n), ceil128(k) * bits / 8].");
    m.def("unpack", &unpack, no_gil(), py::arg("packed_ptr"), py::arg("n"), py::arg("k"), py::arg("bits"),
          py::arg("out_ptr"), "The inverse of pack: sign-extended int8 codes [n, k].");
    m.def("quantize_rows", &quantize_rows, no_gil(), py::arg("x_ptr"), py::arg("dtype"), py::arg("rows"),
          py::arg("k"), py::arg("row_stride"), py::arg("mode"), py::arg("clip"), py::arg("static_scale"),
          py::arg("q_ptr"), py::arg("scale_ptr"), py::arg("sum_ptr"),
          "Float rows -> int8 codes, fp32 scales, int32 row sums.");
    dqk::binding::define_cpu_step(m);
    dqk::binding::define_cpu_beams(m);
    dqk::binding::define_cpu_attention(m);
    dqk::binding::define_cpu_gemm(m);
    dqk::binding::define_cpu_norm(m);
    dqk::binding::define_cpu_encoder(m);
#if DQK_BUILD_CUDA
    m.def("cuda_quantize_rows", &cuda_quantize_rows, no_gil(), py::arg("x_ptr"), py::arg("dtype"),
          py::arg("rows"), py::arg("k"), py::arg("row_stride"), py::arg("mode"), py::arg("clip"),
          py::arg("static_scale"), py::arg("q_ptr"), py::arg("scale_ptr"), py::arg("sum_ptr"),
          py::arg("stream"), py::arg("static_scale_ptr") = 0,
          "quantize_rows on the current CUDA device, queued on a stream. static_scale_ptr: a float on the "
          "device, read "
          "instead of static_scale.");
    dqk::binding::define_skinny(m);
    dqk::binding::define_cuda_attention(m);
#endif
}
