// LayerNorm and GELU with quantization, on a CPU.
#pragma once
#include <pybind11/pybind11.h>

namespace dqk::binding {

void define_cpu_norm(pybind11::module_& m);

}  // namespace dqk::binding
