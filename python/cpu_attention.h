// Attention on a CPU, and what fills its caches.
#pragma once
#include <pybind11/pybind11.h>

namespace dqk::binding {

void define_cpu_attention(pybind11::module_& m);

}  // namespace dqk::binding
