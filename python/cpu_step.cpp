// CpuStep: the calls of a decode step, written down once and run for every token.
#include "cpu_step.h"

namespace py = pybind11;

namespace dqk::binding {

void define_cpu_step(py::module_& m) {
    py::class_<DecoderStep>(
        m, "CpuStep", py::module_local(),  // a second copy of the core may be loaded beside this one
        "Calls of a decode step: CpuPlan.run, norm_quantize, cache_write and attention_decode with `step` "
        "append themselves. Operands must stay alive.")
        .def(py::init<>())
        .def("__len__", &DecoderStep::size)
        .def(
            "run",
            [](const DecoderStep& step, int32_t threads) {
                Status status = Status::ok;
                {
                    py::gil_scoped_release released;
                    status = step.run(threads);
                }
                if (status == Status::out_of_memory) status = Status::no_memory;
                raise_unless_ok(status, "CpuStep.run");
            },
            py::arg("threads"), "All of them, in order, without the interpreter's lock.");
}

}  // namespace dqk::binding
