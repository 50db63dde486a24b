// The loops for one and for a few rows of activations of a set with 32 registers and sums of 32 bits, where
// weights are multiplied as soon as they are unpacked and nothing is laid down on the way. Without groups; a
// dot that has them derives from InRegisters and offers, beside what gemm_kernel.h asks for,
//     unpack(block, u)  the 128 codes of a block as two vectors, in the order of k
//     fields(block, u)  the same codes where they lie in their bytes: each vector, or half of one, times a
//                       power of two, so that no block is shifted
//     merge(a, b)       one sum of two of such vectors, without those powers
#pragma once
#include <type_traits>
#include <utility>

#include "cpu/gemm_kernel.h"

namespace dqk {
namespace {

struct InRegisters {};
template <typename Dot, int kGroup>
constexpr bool in_registers() {
    return kGroup == 0 && std::is_base_of_v<InRegisters, Dot>;
}

// ---- one row of activations ------------------------------------------------------------------------------

// A lane takes 4 products of each block, at most 240 * 128 each: K would have to pass 2 million to overflow.
static_assert(kMaxGemmK / kBlockK * 4 * 240 * 128 < INT32_MAX / 2, "sums of fields fit, twice them too");

template <typename Dot, typename F>
DQK_TARGET void one_sums_fields(const uint8_t* x, int64_t, int64_t, const GemmWeights& w, int64_t n0,
                                int64_t count, int32_t* acc, uint8_t*) {
    constexpr int64_t kBytes = block_bytes(F::kBits);
    for (int64_t c = 0; c < count; c += kGemmRows) {
        const uint8_t* row = w.rows + (n0 + c) * w.row_bytes;
        typename Dot::Sum first[kGemmRows], second[kGemmRows];
        for (int64_t r = 0; r < kGemmRows; ++r) first[r] = second[r] = Dot::sum_zero();
        for (int64_t b = 0; b < w.blocks; ++b) {
            const typename Dot::X x0 = Dot::load_x(x, 2 * b), x1 = Dot::load_x(x, 2 * b + 1);
            for (int64_t r = 0; r < kGemmRows; ++r) {
                typename Dot::Vec u[2];
                ask_far<kBytes>(row + r * w.row_bytes + b * kBytes);
                Dot::template fields<F>(row + r * w.row_bytes + b * kBytes, u);
                first[r] = Dot::multiply(first[r], u[0], x0);
                second[r] = Dot::multiply(second[r], u[1], x1);
            }
            for (int64_t r = 0; r < kGemmRows; ++r) {
                Dot::pin(first[r]);
                Dot::pin(second[r]);
            }
        }
        for (int64_t r = 0; r < kGemmRows; ++r) first[r] = Dot::template merge<F>(first[r], second[r]);
        Dot::reduce(first, acc + c);
    }
}

// ---- a few rows of activations ---------------------------------------------------------------------------

// kM rows of x meet four rows of weights: the sum of row m and weights r at place 4 m + r. Places are spelled
// out when compiled, by folding over them: an array that loops go through stays in memory with GCC.
template <typename Dot, int kM>
struct TileSums {
    typename Dot::Sum at[kM * kGemmRows];
};
template <int... kAt>
using Sequence = std::integer_sequence<int, kAt...>;
template <int kM>
using TilePlaces = std::make_integer_sequence<int, kM* static_cast<int>(kGemmRows)>;

template <typename Dot, int kM, int... kAt>
DQK_TARGET inline void clear_tile(TileSums<Dot, kM>& sums, Sequence<kAt...>) {
    ((sums.at[kAt] = Dot::sum_zero()), ...);
    (Dot::pin(sums.at[kAt]), ...);
}
template <typename Dot, int kM, int... kAt>
DQK_TARGET inline void multiply_block(const uint8_t* x, int64_t stride,
                                      const typename Dot::Vec (&u)[kGemmRows][2], TileSums<Dot, kM>& sums,
                                      Sequence<kAt...>) {
    ((sums.at[kAt] = Dot::multiply(
          Dot::multiply(sums.at[kAt], u[kAt % kGemmRows][0], Dot::load_x(x + kAt / kGemmRows * stride, 0)),
          u[kAt % kGemmRows][1], Dot::load_x(x + kAt / kGemmRows * stride, 1))),
     ...);
    (Dot::pin(sums.at[kAt]), ...);
}
template <typename Dot, int kM, int... kRow>
DQK_TARGET inline void store_tile(const TileSums<Dot, kM>& sums, int32_t* acc, Sequence<kRow...>) {
    (Dot::reduce({sums.at[4 * kRow], sums.at[4 * kRow + 1], sums.at[4 * kRow + 2], sums.at[4 * kRow + 3]},
                 acc + kRow * kGemmColumns),
     ...);
}

// acc[m][r] of kM rows of x, `stride` bytes apart, and the four rows of weights from `row` on.
template <typename Dot, typename F, int kM>
DQK_TARGET __attribute__((noinline)) void register_tile(const uint8_t* x, int64_t stride,
                                                        const GemmWeights& w, const uint8_t* row,
                                                        int32_t* acc) {
    static_assert(kGemmRows == 4, "store_tile takes four");
    constexpr int64_t kBytes = block_bytes(F::kBits);
    TileSums<Dot, kM> sums;
    clear_tile(sums, TilePlaces<kM>());
    for (int64_t b = 0; b < w.blocks; ++b) {
        typename Dot::Vec u[kGemmRows][2];
        for (int64_t r = 0; r < kGemmRows; ++r) {
            ask_far<kBytes>(row + r * w.row_bytes + b * kBytes);
            Dot::template unpack<F>(row + r * w.row_bytes + b * kBytes, u[r]);
        }
        multiply_block(x + b * kBlockK, stride, u, sums, TilePlaces<kM>());
    }
    store_tile(sums, acc, std::make_integer_sequence<int, kM>());
}

template <typename Dot, typename F>
DQK_TARGET void few_sums_registers(const uint8_t* x, int64_t stride, int64_t rows, const GemmWeights& w,
                                   int64_t n0, int64_t count, int32_t* acc, uint8_t*) {
    constexpr int64_t kMost = 4;  // rows of x at a time: 16 sums and 8 vectors of weights
    for (int64_t c = 0; c < count; c += kGemmRows) {
        const uint8_t* row = w.rows + (n0 + c) * w.row_bytes;
        for (int64_t m = 0; m < rows; m += kMost) {
            const uint8_t* from = x + m * stride;
            int32_t* to = acc + m * kGemmColumns + c;
            switch (rows - m) {
                case 1:
                    register_tile<Dot, F, 1>(from, stride, w, row, to);
                    break;
                case 2:
                    register_tile<Dot, F, 2>(from, stride, w, row, to);
                    break;
                case 3:
                    register_tile<Dot, F, 3>(from, stride, w, row, to);
                    break;
                default:
                    register_tile<Dot, F, 4>(from, stride, w, row, to);
            }
        }
    }
}

}  // namespace
}  // namespace dqk
