// A layer of an encoder on a CPU.
#pragma once
#include <pybind11/pybind11.h>

namespace dqk::binding {

void define_cpu_encoder(pybind11::module_& m);

}  // namespace dqk::binding
