// Beam search behind the scores of a decode step.
#pragma once
#include <pybind11/pybind11.h>

namespace dqk::binding {

void define_cpu_beams(pybind11::module_& m);

}  // namespace dqk::binding
