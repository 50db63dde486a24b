// CpuPlan, the embedding, and loops that measure a machine: addresses and sizes in, structs of api.h out.
#include "cpu_gemm.h"

#include <pybind11/stl.h>

#include <new>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/threads.h"
#include "cpu_step.h"
#include "dqk/api.h"

namespace py = pybind11;

namespace dqk::binding {
namespace {

constexpr const char* kWhere = "cpu_gemm";

void raise_cpu(Status status, const char* where) {
    if (status == Status::out_of_memory) throw std::bad_alloc();
    if (status == Status::bad_id) throw py::index_error(std::string(where) + ": " + sentence(status));
    raise_unless_ok(status, where);
}

void embedding(uintptr_t ids, bool ids32, int64_t count, uintptr_t qweight, uintptr_t weight_scale,
               bool tensor_scale, uintptr_t group_mult, int64_t rows, int64_t k, int bits, bool four_level,
               int group_size, float embed_scale, uintptr_t position, int position_dtype,
               int64_t position_stride, uintptr_t y, int y_dtype, int threads, int kernel,
               DecoderStep* step) {
    constexpr const char* kName = "cpu_embedding";
    const bool needed = count > 0;
    CpuEmbedding args = {};
    args.ids = pointer<const void>(ids, ids32 ? 4 : 8, needed, kName, "ids");
    args.ids32 = ids32;
    args.count = count;
    args.qweight = pointer<const uint8_t>(qweight, 1, needed, kName, "qweight");
    args.weight_scale = pointer<const float>(weight_scale, 4, needed, kName, "weight_scale");
    args.tensor_scale = tensor_scale;
    args.group_mult = pointer<const uint8_t>(group_mult, 1, needed && group_size != 0, kName, "group_mult");
    args.rows = rows;
    args.k = k;
    args.bits = bits;
    args.four_level = four_level;
    args.group_size = group_size;
    args.embed_scale = embed_scale;
    args.position_dtype = dtype_of(position_dtype, kName);
    args.position =
        pointer<const void>(position, element_bytes(args.position_dtype), false, kName, "position");
    args.position_stride = position_stride;
    args.y_dtype = dtype_of(y_dtype, kName);
    args.y = pointer<void>(y, element_bytes(args.y_dtype), needed, kName, "y");
    args.threads = threads;
    args.kernel = kernel;
    raise_cpu(run_or_add(args, cpu_embedding, step), kName);
}

// Several pieces of memory of one size, one after the other.
uint64_t read(const std::vector<uintptr_t>& pieces, int64_t bytes, int threads) {
    constexpr const char* kName = "read_bytes";
    for (const uintptr_t piece : pieces) pointer<const void>(piece, 1, bytes > 0, kName, "piece");
    uint64_t total = 0;
    Status status = Status::ok;
    {
        py::gil_scoped_release released;
        for (const uintptr_t piece : pieces) {
            uint64_t sum = 0;
            status = read_bytes(reinterpret_cast<const void*>(piece), bytes, threads, &sum);
            if (status != Status::ok) break;
            total += sum;
        }
    }
    raise_cpu(status, kName);
    return total;
}

int64_t multiply(int64_t products, int threads) {
    int64_t sum = 0;
    Status status = Status::ok;
    {
        py::gil_scoped_release released;
        status = multiply_bytes(products, threads, &sum);
    }
    raise_cpu(status, "multiply_bytes");
    return sum;
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (int32_t i = 0; gemm_kernel_name(i) != nullptr; ++i) names.emplace_back(gemm_kernel_name(i));
    return names;
}

std::string active_kernel() {
    int32_t index = 0;
    raise_unless_ok(active_gemm_kernel(&index), kWhere);
    return gemm_kernel_name(index);
}

}  // namespace

CpuPlan::CpuPlan(int64_t k, int x_dtype, int mode, float clip, int bits, bool four_level, int group_size,
                 int activation, int y_dtype, const std::vector<int64_t>& n,
                 const std::vector<bool>& tensor_scale, const std::vector<int>& bias_dtype,
                 const std::vector<int>& residual_dtype, int kernel) {
    if (n.empty() || n.size() > kMaxCpuParts || tensor_scale.size() != n.size() ||
        bias_dtype.size() != n.size() || residual_dtype.size() != n.size())
        raise_unless_ok(Status::bad_cpu_part, kWhere);
    args_.k = k;
    args_.x_dtype = x_dtype == 3 ? DType::int8 : dtype_of(x_dtype, kWhere);
    args_.mode = mode_of(mode, kWhere);
    args_.clip = clip;
    args_.bits = bits;
    args_.four_level = four_level;
    args_.group_size = group_size;
    args_.activation = static_cast<Activation>(activation);
    args_.y_dtype = dtype_of(y_dtype, kWhere);
    args_.part_count = static_cast<int32_t>(n.size());
    args_.kernel = kernel;
    parts_.resize(n.size());
    for (size_t i = 0; i < n.size(); ++i) {
        parts_[i].n = n[i];
        parts_[i].tensor_scale = tensor_scale[i];
        parts_[i].bias_dtype = dtype_of(bias_dtype[i], kWhere);
        parts_[i].residual_dtype = dtype_of(residual_dtype[i], kWhere);
    }
}

CpuGemm CpuPlan::call(const std::vector<PartPointers>& pointers, bool has_rows, CpuPart* parts,
                      int32_t room) const {
    if (pointers.size() != parts_.size() || args_.part_count > room)
        raise_unless_ok(Status::bad_cpu_part, kWhere);
    const bool grouped = args_.group_size != 0;
    for (size_t i = 0; i < pointers.size(); ++i) {
        CpuPart& part = parts[i];
        part = parts_[i];
        const PartPointers& given = pointers[i];
        part.qweight = pointer<const uint8_t>(given[0], 1, true, kWhere, "qweight");
        part.weight_scale = pointer<const float>(given[1], 4, true, kWhere, "weight_scale");
        part.group_mult = pointer<const uint8_t>(given[2], 1, grouped, kWhere, "group_mult");
        part.bias = pointer<const void>(given[3], element_bytes(part.bias_dtype), false, kWhere, "bias");
        part.residual =
            pointer<const void>(given[4], element_bytes(part.residual_dtype), false, kWhere, "residual");
        part.y = pointer<void>(given[5], element_bytes(args_.y_dtype), has_rows, kWhere, "y");
    }
    CpuGemm args = args_;
    args.parts = parts;
    return args;
}

void CpuPlan::run(int64_t m, int64_t row_stride, uintptr_t x, uintptr_t act_scale, float static_scale,
                  int32_t threads, const std::vector<PartPointers>& pointers, DecoderStep* step) const {
    CpuPart parts[kMaxCpuParts];
    CpuGemm args = call(pointers, m > 0, parts, kMaxCpuParts);
    args.m = m;
    args.row_stride = row_stride;
    args.x = pointer<const void>(x, element_bytes(args.x_dtype), m > 0, kWhere, "x");
    args.act_scale = pointer<const float>(act_scale, 4, false, kWhere, "act_scale");
    args.static_scale = static_scale;
    args.threads = threads;
    raise_cpu(run_or_add(args, cpu_gemm, step), kWhere);
}

void define_cpu_gemm(py::module_& m) {
    m.def("cpu_gemm_kernels", &kernel_names,
          "The GEMM kernels of this build, whether this CPU can run them or not.");
    m.def("cpu_gemm_kernel", &active_kernel,
          "The one in use: of the instruction set, or the best that it includes.");
    m.def("cpu_threads", &thread_source, "Whose threads a call borrows in this process.");
    m.def("cpu_embedding", &embedding, py::kw_only(), py::arg("ids"), py::arg("ids32"), py::arg("count"),
          py::arg("qweight"), py::arg("weight_scale"), py::arg("tensor_scale"), py::arg("group_mult"),
          py::arg("rows"), py::arg("k"), py::arg("bits"), py::arg("four_level"), py::arg("group_size"),
          py::arg("embed_scale"), py::arg("position"), py::arg("position_dtype"), py::arg("position_stride"),
          py::arg("y"), py::arg("y_dtype"), py::arg("threads"), py::arg("kernel") = 0,
          py::arg("step").none(true) = nullptr, "Rows of a packed table -> floats.");
    m.def("read_bytes", &read, py::arg("pieces"), py::arg("bytes"), py::arg("threads"),
          "Reads pieces of memory (addresses) and does nothing else; the sum of their words.");
    m.def("multiply_instruction", &multiply_instruction,
          "The byte product that multiply_bytes repeats, or None where there is no loop for the instruction "
          "set.");
    m.def("multiply_bytes", &multiply, py::arg("products"), py::arg("threads"),
          "Multiplies at least so many pairs of bytes in registers and does nothing else; their number.");
    py::class_<CpuPlan>(m, "CpuPlan", py::module_local(),  // a second copy of the core may be loaded
                        "Options of a linear on the CPU; `run` computes it.")
        .def(py::init<int64_t, int, int, float, int, bool, int, int, int, const std::vector<int64_t>&,
                      const std::vector<bool>&, const std::vector<int>&, const std::vector<int>&, int>(),
             py::kw_only(), py::arg("k"), py::arg("x_dtype"), py::arg("mode"), py::arg("clip"),
             py::arg("bits"), py::arg("four_level"), py::arg("group_size"), py::arg("activation"),
             py::arg("y_dtype"), py::arg("n"), py::arg("tensor_scale"), py::arg("bias_dtype"),
             py::arg("residual_dtype"), py::arg("kernel") = 0)
        .def("run", &CpuPlan::run, py::arg("m"), py::arg("row_stride"), py::arg("x"), py::arg("act_scale"),
             py::arg("static_scale"), py::arg("threads"), py::arg("parts"),
             py::arg("step").none(true) = nullptr);
}

}  // namespace dqk::binding
