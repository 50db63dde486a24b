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
    return dtype == DType::float32 ? 4 : 2;
}

}  // namespace dqk
