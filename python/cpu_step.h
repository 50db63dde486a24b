// A decode step that is written down by the calls it is made of.
#pragma once
#include <pybind11/pybind11.h>

#include "checks.h"
#include "cpu/decoder_step.h"

namespace dqk::binding {

void define_cpu_step(pybind11::module_& m);

// Makes a checked call without the interpreter's lock, or writes it down where a step is given.
template <typename Call>
Status run_or_add(const Call& call, Status (*run)(const Call&), DecoderStep* step) {
    if (step != nullptr) return step->add(call);
    pybind11::gil_scoped_release released;
    return run(call);
}

}  // namespace dqk::binding
