// Reading one element of a float tensor as fp32. The binding has checked alignment.
#pragma once
#include <cstdint>

#include "dqk/api.h"
#include "dqk/rounding.h"

namespace dqk {

template <DType kType>
struct Element;

template <>
struct Element<DType::float32> {
    using type = float;
    static DQK_HD float widen(float x) { return x; }
};
template <>
struct Element<DType::float16> {
    using type = uint16_t;
    static DQK_HD float widen(uint16_t x) { return half_to_float(x); }
};
template <>
struct Element<DType::bfloat16> {
    using type = uint16_t;
    static DQK_HD float widen(uint16_t x) { return bfloat16_to_float(x); }
};

constexpr int64_t element_bytes(DType dtype) {
    return dtype == DType::float32 ? 4 : dtype == DType::int8 ? 1 : 2;
}

// Element i of an array whose type is known at run time only: for the few values per row or column.
DQK_HD float load_element(const void* base, DType dtype, int64_t i) {
    if (dtype == DType::float16) return half_to_float(static_cast<const uint16_t*>(base)[i]);
    if (dtype == DType::bfloat16) return bfloat16_to_float(static_cast<const uint16_t*>(base)[i]);
    return static_cast<const float*>(base)[i];
}

// Rounds to the type, half to even, and stores.
DQK_HD void store_element(void* base, DType dtype, int64_t i, float x) {
    if (dtype == DType::float16) {
        static_cast<uint16_t*>(base)[i] = float_to_half(x);
    } else if (dtype == DType::bfloat16) {
        static_cast<uint16_t*>(base)[i] = float_to_bfloat16(x);
    } else {
        static_cast<float*>(base)[i] = x;
    }
}

// What `store_element` would store, widened again: for values that are rounded, stored and used on.
DQK_HD float round_to(DType dtype, float x) {
    if (dtype == DType::float16) return half_to_float(float_to_half(x));
    if (dtype == DType::bfloat16) return bfloat16_to_float(float_to_bfloat16(x));
    return x;
}

}  // namespace dqk
