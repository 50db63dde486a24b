// What the binding refuses before a pointer is dereferenced, one sentence each. The tensor-level checks
// (device, dtype, shape, stride) are in dqkernels/kernels/native.py, which still has the tensors.
#pragma once
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#include "dqk/api.h"
#include "dqk/element.h"

namespace dqk::binding {

// ValueError for what the caller can mend in the call, RuntimeError for what the machine lacks.
inline void raise_unless_ok(Status status, const char* where) {
    if (status == Status::ok) return;
    const std::string text = std::string(where) + ": " + sentence(status);
    if (status == Status::no_memory) throw std::bad_alloc();  // MemoryError
    if (status >= Status::cuda_no_driver) throw std::runtime_error(text);
    throw std::invalid_argument(text);
}

// pybind11 turns std::invalid_argument into ValueError.
template <typename T>
T* pointer(uintptr_t address, uintptr_t alignment, bool needed, const char* where, const char* name) {
    if (address == 0 && needed)
        throw std::invalid_argument(std::string(where) + ": " + name + " is a null pointer");
    if (address % alignment != 0)
        throw std::invalid_argument(std::string(where) + ": " + name + " must be aligned to " +
                                    std::to_string(alignment) + " bytes");
    return reinterpret_cast<T*>(address);
}

inline DType dtype_of(int code, const char* where) {
    if (code < 0 || code > 2) raise_unless_ok(Status::bad_dtype, where);
    return static_cast<DType>(code);
}

inline ActMode mode_of(int code, const char* where) {
    if (code < 0 || code > 2) raise_unless_ok(Status::bad_mode, where);
    return static_cast<ActMode>(code);
}

}  // namespace dqk::binding
