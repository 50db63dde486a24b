// CpuStep: the calls of a decode step, written down once and run for every token; and the two calls that only
// such a step makes.
#include "cpu_step.h"

namespace py = pybind11;

namespace dqk::binding {
namespace {

void raise_step(Status status, const char* where) {
    if (status == Status::out_of_memory) status = Status::no_memory;
    if (status == Status::bad_id) throw py::index_error(std::string(where) + ": " + sentence(status));
    raise_unless_ok(status, where);
}

void add_position(uintptr_t x, int dtype, int64_t rows, int64_t k, float factor, uintptr_t table,
                  int64_t table_rows, uintptr_t position, int64_t offset, DecoderStep* step) {
    constexpr const char* kWhere = "add_position";
    const bool needed = rows > 0;
    AddPosition args = {};
    args.dtype = dtype_of(dtype, kWhere);
    args.x = pointer<void>(x, element_bytes(args.dtype), needed, kWhere, "x");
    args.rows = rows;
    args.k = k;
    args.factor = factor;
    args.table = pointer<const void>(table, element_bytes(args.dtype), needed, kWhere, "table");
    args.table_rows = table_rows;
    args.position = pointer<const int32_t>(position, 4, needed, kWhere, "position");
    args.offset = offset;
    raise_step(run_or_add(args, dqk::add_position, step), kWhere);
}

void finish_logits(uintptr_t x, int dtype, int64_t rows, int64_t n, uintptr_t bias, int bias_dtype,
                   bool rounded, uintptr_t y, uintptr_t best, int threads, DecoderStep* step) {
    constexpr const char* kWhere = "finish_logits";
    const bool needed = rows > 0;
    FinishLogits args = {};
    args.dtype = dtype_of(dtype, kWhere);
    args.x = pointer<const void>(x, element_bytes(args.dtype), needed, kWhere, "x");
    args.rows = rows;
    args.n = n;
    args.bias_dtype = dtype_of(bias_dtype, kWhere);
    args.bias = pointer<const void>(bias, element_bytes(args.bias_dtype), false, kWhere, "bias");
    args.rounded = rounded;
    args.y = pointer<float>(y, 4, needed, kWhere, "y");
    args.best = pointer<int64_t>(best, 8, false, kWhere, "best");
    args.threads = threads;
    raise_step(run_or_add(args, dqk::finish_logits, step), kWhere);
}

void set_rows(DecoderStep& step, int64_t rows, int64_t capacity, uintptr_t tokens, uintptr_t positions,
              uintptr_t lengths, uintptr_t ancestors) {
    constexpr const char* kWhere = "CpuStep.set_rows";
    const bool needed = rows > 0;
    if (rows < 0 || capacity < 0) raise_unless_ok(Status::bad_size, kWhere);
    StepRows given = {};
    given.rows = rows;
    given.capacity = capacity;
    given.tokens = pointer<int64_t>(tokens, 8, needed, kWhere, "tokens");
    given.positions = pointer<int32_t>(positions, 4, needed, kWhere, "positions");
    given.lengths = pointer<int32_t>(lengths, 4, needed, kWhere, "lengths");
    given.ancestors = pointer<int32_t>(ancestors, 4, false, kWhere, "ancestors");
    step.set_rows(given);
}

void run(const DecoderStep& step, int32_t threads, uintptr_t tokens, int64_t position, bool wants_best) {
    constexpr const char* kWhere = "CpuStep.run";
    const auto* given = pointer<const int64_t>(tokens, 8, false, kWhere, "tokens");
    Status status = Status::ok;
    {
        py::gil_scoped_release released;
        if (given != nullptr) status = step.place(given, position);
        if (status == Status::ok) status = step.run(threads, wants_best);
    }
    raise_step(status, kWhere);
}

}  // namespace

void define_cpu_step(py::module_& m) {
    py::class_<DecoderStep>(
        m, "CpuStep", py::module_local(),  // a second copy of the core may be loaded beside this one
        "Calls of a decode step: CpuPlan.run, norm_quantize, cache_write, attention_decode, cpu_embedding, "
        "add_position and finish_logits with `step` append themselves. Operands must stay alive.")
        .def(py::init<>())
        .def("__len__", &DecoderStep::size)
        .def("set_rows", &set_rows, py::arg("rows"), py::arg("capacity"), py::arg("tokens"),
             py::arg("positions"), py::arg("lengths"), py::arg("ancestors"),
             "The tensors that `run` writes tokens and their position into.")
        .def("run", &run, py::arg("threads"), py::arg("tokens") = 0, py::arg("position") = 0,
             py::arg("wants_best") = false,
             "All of them, in order, without the interpreter's lock; for new tokens, where they are given.");
    m.def("add_position", &add_position, py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("rows"),
          py::arg("k"), py::arg("factor"), py::arg("table"), py::arg("table_rows"), py::arg("position"),
          py::arg("offset"), py::arg("step").none(true) = nullptr,
          "x = x * factor + rows of a table, in place.");
    m.def("finish_logits", &finish_logits, py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("rows"),
          py::arg("n"), py::arg("bias"), py::arg("bias_dtype"), py::arg("rounded"), py::arg("y"),
          py::arg("best"), py::arg("threads"), py::arg("step").none(true) = nullptr,
          "Logits as fp32, with their bias, and the place of the largest in each row.");
}

}  // namespace dqk::binding
