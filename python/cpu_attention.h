// Attention on a CPU, and what fills its caches.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "dqk/api.h"

namespace dqk::binding {

// Address, dtype code, strides in elements.
using OperandArgument = std::tuple<uintptr_t, int, std::array<int64_t, 4>>;

Operand operand_of(const std::optional<OperandArgument>& given, bool is_mask, bool needed, const char* where,
                   const char* name);

void define_cpu_attention(pybind11::module_& m);

}  // namespace dqk::binding
