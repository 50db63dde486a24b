// Decode attention's part of the extension module.
#pragma once
#include <pybind11/pybind11.h>

namespace dqk::binding {

void define_cuda_attention(pybind11::module_& m);

}  // namespace dqk::binding
