// The loops of the CPU GEMM as templates over what an instruction set can do. Each gemm_<set>.cpp defines
// DQK_TARGET, the function attribute of its set, then its operations, then instantiates them (`kernel_of`,
// gemm_table.h).
//
// Everything here has internal linkage and the attribute of the one file that includes it: code of one set
// can never be linked into another. Lambdas do not inherit the attribute, so there are none.
//
// A set has up to four ways to multiply ("dots"). A dot is a struct with
//     Vec        a register of weights, X one of activations (or two); each holds kCodes of them
//     kXBytes    bytes of a prepared row for an activation; store_x writes kGrain activations at a time
//     Sum        int32 lanes;  Partial, what products are added to first
//     kSteps     vectors that a Partial holds without overflow; 0 for any number. In a panel (gemm_panel.h),
//                whose offsets are off from the start: kPanelSteps
//     kOffset8   what the codes of 8-bit weights are larger than the signed ones: 128, or 0
//     pin        nothing, to a compiler that copies an accumulator in every step once it has seen that it is
//     0 zero, load, multiply(partial, w, x), drain(sum, partial), drain_scaled(sum, partial, multipliers),
//     ...
// The model of all of them in plain C++ is gemm_plain.h.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/gelu.h"
#include "cpu/gemm_loops.h"
#include "cpu/prefetch.h"
#include "dqk/element.h"
#include "dqk/format.h"
#include "dqk/rounding.h"

#if defined(__clang__)
#define DQK_UNROLL_2 _Pragma("unroll 2")
#else
#define DQK_UNROLL_2 _Pragma("GCC unroll 2")
#endif
#ifndef DQK_TARGET
#error "define DQK_TARGET first: the function attribute of the instruction set"
#endif

namespace dqk {
namespace {

// The weight formats. Unsigned code: (field of the byte ^ kFlip) * kFactor, which is kOffset more than the
// level.
struct W8 {
    static constexpr int32_t kBits = 8, kFactor = 1;  // the offset is the dot's: some take signed bytes
};
struct W4 {
    static constexpr int32_t kBits = 4, kFactor = 1, kOffset = 8;
};
struct W2 {
    static constexpr int32_t kBits = 2, kFactor = 1, kOffset = 2;
};
struct W2F {  // four_level: a code c is the level 2c + 1 = 2 (c + 2) - 3
    static constexpr int32_t kBits = 2, kFactor = 2, kOffset = 3;
};
template <typename Dot, typename F>
constexpr int32_t offset_of() {
    if constexpr (F::kBits == 8) {
        return Dot::kOffset8;
    } else {
        return F::kOffset;
    }
}

// With an offset of 128 a sum may pass 2^31 on its way to a result that does not.
DQK_HD int32_t wrap_add(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

template <typename Dot>
constexpr int64_t vectors(int64_t blocks) {
    return blocks * (kBlockK / Dot::kCodes);
}

// With groups of kGroup codes (0: none): the vectors whose products are added before a multiplier is applied.
// One vector may hold two groups.
template <typename Dot, int kGroup>
constexpr int64_t span_vectors() {
    return kGroup > Dot::kCodes ? kGroup / Dot::kCodes : 1;
}

// ---- rows of activations ---------------------------------------------------------------------------------

template <typename Dot, typename F, int kGroup>
int64_t row_bytes(int64_t blocks) {
    int64_t bytes = blocks * kBlockK * Dot::kXBytes;
    if (kGroup > 0)
        bytes += vectors<Dot>(blocks) / span_vectors<Dot, kGroup>() *
                 static_cast<int64_t>(sizeof(typename Dot::Partial));
    return (bytes + 63) / 64 * 64;
}

// The codes of a row, in the dot's order, and zeros up to a whole block.
template <typename Dot>
DQK_TARGET inline void store_row(const int8_t* q, int64_t k, int64_t blocks, uint8_t* row) {
    const int64_t whole = k / Dot::kGrain, all = blocks * (kBlockK / Dot::kGrain);
    for (int64_t i = 0; i < whole; ++i) Dot::store_x(q + i * Dot::kGrain, row, i);
    int8_t tail[Dot::kGrain] = {};
    if (k % Dot::kGrain != 0)
        std::memcpy(tail, q + whole * Dot::kGrain, static_cast<size_t>(k % Dot::kGrain));
    for (int64_t i = whole; i < all; ++i) {
        Dot::store_x(tail, row, i);
        std::memset(tail, 0, sizeof tail);
    }
}

template <typename Dot, typename F, int kGroup>
DQK_TARGET void prepare(const int8_t* q, int64_t k, int64_t blocks, uint8_t* row) {
    store_row<Dot>(q, k, blocks, row);
    if constexpr (kGroup > 0) {
        constexpr int64_t kSpan = span_vectors<Dot, kGroup>();
        uint8_t* starts = row + blocks * kBlockK * Dot::kXBytes;
        const typename Dot::Vec offset = Dot::splat(offset_of<Dot, F>());
        for (int64_t s = 0; s < vectors<Dot>(blocks) / kSpan; ++s) {
            typename Dot::Partial sum = Dot::zero();
            for (int64_t v = s * kSpan; v < (s + 1) * kSpan; ++v)
                sum = Dot::multiply(sum, offset, Dot::load_x(row, v));
            Dot::store_partial(Dot::negate(sum), starts, s);
        }
    }
}

// Multipliers of rows n .. n + 3 as the words that Dot::multipliers reads, gemm_words() of them a row: 0
// behind the last group, where a block is not full. Padding rows have none of their own; their sums are not
// used.
template <typename Dot>
DQK_TARGET void multiplier_words(const GemmWeights& w, int64_t n, int64_t stride, int32_t* words) {
    for (int64_t r = 0; r < kGemmRows; ++r) {
        const uint8_t* mult = w.mult + (n + r < w.n ? n + r : w.n - 1) * w.groups;
        int32_t* out = words + r * stride;
        for (int64_t g = 0; g < w.groups; ++g) out[g] = mult[g] * Dot::kMultiplierWord;
        for (int64_t g = w.groups; g < stride; ++g) out[g] = 0;
    }
}

// Asks for what the walk along the weights needs a moment later. It goes along four rows at once, a block of
// each at a time, which the hardware takes for four short streams and hardly runs ahead of; but rows follow
// each other without a gap, so that so many bytes further is where it will be some rows later. Behind the
// last row a request for memory that nobody has is no fault.
//
// Into the second cache: the first takes too few requests at a time for memory that is far away. Blocks of
// less than a line, whose walk the first cache waits for more often, do as well there on the way of AVX2.
constexpr uintptr_t kFarAhead = 8192, kNearAhead = 4096;
DQK_TARGET inline const void* further(const uint8_t* block, uintptr_t bytes) {
    return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(block) + bytes);
}
template <int64_t kBytes>
DQK_TARGET inline void ask_far(const uint8_t* block) {
    for (int64_t line = 0; line < kBytes; line += kLineBytes)
        __builtin_prefetch(further(block, kFarAhead + static_cast<uintptr_t>(line)), 0, 2);
}
template <int64_t kBytes>
DQK_TARGET inline void ask_ahead(const uint8_t* block) {
    if constexpr (kBytes >= kLineBytes)
        ask_far<kBytes>(block);
    else
        ask_for(further(block, kNearAhead), kBytes);
}

// ---- one row of activations: the weights are unpacked in registers ---------------------------------------

template <typename Dot, typename F, int kGroup>
DQK_TARGET void one_sums(const uint8_t* x, int64_t, int64_t, const GemmWeights& w, int64_t n0, int64_t count,
                         int32_t* acc, uint8_t* scratch) {
    constexpr int64_t kVecs = kBlockK / Dot::kCodes, kBytes = block_bytes(F::kBits);
    int32_t* words = reinterpret_cast<int32_t*>(scratch + kGemmScratchBytes);
    const uint8_t* starts = x + w.blocks * kBlockK * Dot::kXBytes;
    for (int64_t c = 0; c < count; c += kGemmRows) {
        const uint8_t* row = w.rows + (n0 + c) * w.row_bytes;
        typename Dot::Sum sum[kGemmRows];
        for (int64_t r = 0; r < kGemmRows; ++r) sum[r] = Dot::sum_zero();
        if constexpr (kGroup > 0) {
            constexpr int64_t kSpan = span_vectors<Dot, kGroup>(), kGroups = kBlockK / kGroup;
            const int64_t stride = gemm_words(w.blocks, kGroup);
            multiplier_words<Dot>(w, n0 + c, stride, words);
            for (int64_t b = 0; b < w.blocks; ++b)
                for (int64_t r = 0; r < kGemmRows; ++r) {
                    typename Dot::Vec u[kVecs];
                    ask_ahead<kBytes>(row + r * w.row_bytes + b * kBytes);
                    Dot::template unpack<F>(row + r * w.row_bytes + b * kBytes, u);
                    for (int64_t first = 0; first < kVecs; first += kSpan) {
                        typename Dot::Partial part = Dot::load_partial(starts, (b * kVecs + first) / kSpan);
                        for (int64_t j = first; j < first + kSpan; ++j)
                            part = Dot::multiply(part, u[j], Dot::load_x(x, b * kVecs + j));
                        const int32_t* mult = words + r * stride + b * kGroups + first * Dot::kCodes / kGroup;
                        sum[r] = Dot::drain_scaled(sum[r], part, Dot::template multipliers<kGroup>(mult));
                    }
                }
        } else {
            constexpr int64_t kDrain = Dot::kSteps > 0 ? Dot::kSteps / kVecs : int64_t{1} << 40;  // blocks
            for (int64_t first = 0; first < w.blocks; first += kDrain) {
                const int64_t last = first + kDrain < w.blocks ? first + kDrain : w.blocks;
                typename Dot::Partial part[kGemmRows];
                for (int64_t r = 0; r < kGemmRows; ++r) part[r] = Dot::zero();
                for (int64_t b = first; b < last; ++b) {
                    typename Dot::X xs[kVecs];
                    for (int64_t j = 0; j < kVecs; ++j) xs[j] = Dot::load_x(x, b * kVecs + j);
                    for (int64_t r = 0; r < kGemmRows; ++r) {
                        typename Dot::Vec u[kVecs];
                        ask_ahead<kBytes>(row + r * w.row_bytes + b * kBytes);
                        Dot::template unpack<F>(row + r * w.row_bytes + b * kBytes, u);
                        for (int64_t j = 0; j < kVecs; ++j) part[r] = Dot::multiply(part[r], u[j], xs[j]);
                    }
                }
                for (int64_t r = 0; r < kGemmRows; ++r) sum[r] = Dot::drain(sum[r], part[r]);
            }
        }
        Dot::reduce(sum, acc + c);
    }
}

// ---- a few rows of activations ---------------------------------------------------------------------------

template <typename Dot, int kM>
DQK_TARGET inline void clear(typename Dot::Partial (&part)[kM][kGemmRows]) {
    for (int m = 0; m < kM; ++m)
        for (int64_t r = 0; r < kGemmRows; ++r) {
            part[m][r] = Dot::zero();
            Dot::pin(part[m][r]);
        }
}

// part[m][r] += products of kM rows of x and the four unpacked rows of weights, over vectors first .. last.
template <typename Dot, int kM>
DQK_TARGET inline void multiply_tile(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t first,
                                     int64_t last, typename Dot::Partial (&part)[kM][kGemmRows]) {
    DQK_UNROLL_2
    for (int64_t v = first; v < last; ++v) {
        typename Dot::X xs[kM];
        for (int m = 0; m < kM; ++m) xs[m] = Dot::load_x(x + m * stride, v);
        for (int64_t r = 0; r < kGemmRows; ++r) {
            const typename Dot::Vec u = Dot::load(panel + r * kGemmPanelStride, v);
            for (int m = 0; m < kM; ++m) part[m][r] = Dot::multiply(part[m][r], u, xs[m]);
        }
        for (int m = 0; m < kM; ++m)
            for (int64_t r = 0; r < kGemmRows; ++r) Dot::pin(part[m][r]);
    }
}

// What a tile stands on: rows of x, four unpacked rows of weights and, with groups, their starts and
// multipliers, all at the first of `count` vectors.
struct Walk {
    const uint8_t* x;
    const uint8_t* starts;
    int64_t stride;  // of both
    const uint8_t* panel;
    int64_t count;
    const int32_t* words;
    int64_t words_stride;
};

// acc[m][r] += the sums of kM rows of x, from row m0 on, and the four rows of weights.
template <typename Dot, int kM, int kGroup>
DQK_TARGET __attribute__((noinline)) void tile(const Walk& walk, int64_t m0, int32_t* acc) {
    const uint8_t* x = walk.x + m0 * walk.stride;
    typename Dot::Sum sum[kM][kGemmRows];
    for (int m = 0; m < kM; ++m)
        for (int64_t r = 0; r < kGemmRows; ++r) sum[m][r] = Dot::sum_zero();
    if constexpr (kGroup > 0) {
        constexpr int64_t kSpan = span_vectors<Dot, kGroup>();
        const uint8_t* starts = walk.starts + m0 * walk.stride;
        for (int64_t first = 0; first < walk.count; first += kSpan) {
            typename Dot::Partial part[kM][kGemmRows];
            for (int m = 0; m < kM; ++m)
                for (int64_t r = 0; r < kGemmRows; ++r)
                    part[m][r] = Dot::load_partial(starts + m * walk.stride, first / kSpan);
            multiply_tile<Dot, kM>(x, walk.stride, walk.panel, first, first + kSpan, part);
            for (int64_t r = 0; r < kGemmRows; ++r) {
                const auto multipliers = Dot::template multipliers<kGroup>(
                    walk.words + r * walk.words_stride + first * Dot::kCodes / kGroup);
                for (int m = 0; m < kM; ++m)
                    sum[m][r] = Dot::drain_scaled(sum[m][r], part[m][r], multipliers);
            }
        }
    } else if constexpr (Dot::kSteps > 0) {
        for (int64_t first = 0; first < walk.count; first += Dot::kSteps) {
            const int64_t last = first + Dot::kSteps < walk.count ? first + Dot::kSteps : walk.count;
            typename Dot::Partial part[kM][kGemmRows];
            clear<Dot, kM>(part);
            multiply_tile<Dot, kM>(x, walk.stride, walk.panel, first, last, part);
            for (int m = 0; m < kM; ++m)
                for (int64_t r = 0; r < kGemmRows; ++r) sum[m][r] = Dot::drain(sum[m][r], part[m][r]);
        }
    } else {
        clear<Dot, kM>(sum);
        multiply_tile<Dot, kM>(x, walk.stride, walk.panel, 0, walk.count, sum);
    }
    for (int m = 0; m < kM; ++m) Dot::add_reduced(sum[m], acc + (m0 + m) * kGemmColumns);
}

template <typename Dot, typename F, int kGroup>
DQK_TARGET void few_sums(const uint8_t* x, int64_t stride, int64_t rows, const GemmWeights& w, int64_t n0,
                         int64_t count, int32_t* acc, uint8_t* scratch) {
    constexpr int64_t kVecs = kBlockK / Dot::kCodes, kBytes = block_bytes(F::kBits);
    constexpr int64_t kBlocks = kGemmPanelBytes / (kVecs * Dot::kVecBytes);  // that the panel holds
    int32_t* words = reinterpret_cast<int32_t*>(scratch + kGemmScratchBytes);
    std::memset(acc, 0, static_cast<size_t>(rows * kGemmColumns) * sizeof(int32_t));
    for (int64_t c = 0; c < count; c += kGemmRows) {
        const int64_t words_stride = gemm_words(w.blocks, kGroup);
        if constexpr (kGroup > 0) multiplier_words<Dot>(w, n0 + c, words_stride, words);
        for (int64_t first = 0; first < w.blocks; first += kBlocks) {
            const int64_t blocks = first + kBlocks < w.blocks ? kBlocks : w.blocks - first;
            for (int64_t r = 0; r < kGemmRows; ++r) {
                const uint8_t* row = w.rows + (n0 + c + r) * w.row_bytes + first * kBytes;
                for (int64_t b = 0; b < blocks; ++b) {
                    typename Dot::Vec u[kVecs];
                    ask_ahead<kBytes>(row + b * kBytes);
                    Dot::template unpack<F>(row + b * kBytes, u);
                    for (int64_t j = 0; j < kVecs; ++j)
                        Dot::store(u[j], scratch + r * kGemmPanelStride, b * kVecs + j);
                }
            }
            Walk walk = {};
            walk.x = x + first * kBlockK * Dot::kXBytes;
            walk.stride = stride;
            walk.panel = scratch;
            walk.count = blocks * kVecs;
            if constexpr (kGroup > 0) {
                walk.starts = x + w.blocks * kBlockK * Dot::kXBytes +
                              first * kVecs / span_vectors<Dot, kGroup>() *
                                  static_cast<int64_t>(sizeof(typename Dot::Partial));
                walk.words = words + first * kBlockK / kGroup;
                walk.words_stride = words_stride;
            }
            int64_t m = 0;
            for (; m + Dot::kTokens <= rows; m += Dot::kTokens)
                tile<Dot, Dot::kTokens, kGroup>(walk, m, acc + c);
            for (; m < rows; ++m) tile<Dot, 1, kGroup>(walk, m, acc + c);
        }
    }
}

// ---- the epilogue ----------------------------------------------------------------------------------------

// Ops::widen and Ops::narrow convert elements between a stored type and fp32; the loops between them are
// plain C++, each step rounded on its own, which the compiler vectorises with the file's attribute. Most
// tiles are of full width: with a count that the compiler knows nothing is left of the loops. Two rows at a
// time, because GELU is one long chain of products and sums: 64 elements keep the processor busy, 32 do not.
constexpr int64_t kEpilogueRows = 2;

template <bool kScales, bool kBias>
DQK_TARGET inline void scale_sums(const GemmEpilogue& args, int64_t row, int64_t count, float* t) {
    const int32_t* acc = args.acc + row * kGemmColumns;
    const int32_t add = args.add[row];
    const float act_scale = args.act_scale[row];
    for (int64_t c = 0; c < count; ++c) {
        const float sum = static_cast<float>(wrap_add(acc[c], add)) * act_scale;
        t[c] = sum * (kScales ? args.weight_scale[c] : *args.weight_scale);
        if (kBias) t[c] = t[c] + args.bias[c];
    }
}

// kRows rows from `row` on.
template <typename Ops, int64_t kRows, bool kFull>
DQK_TARGET inline void finish(const GemmEpilogue& args, int64_t row) {
    float t[kRows * kGemmColumns];
    const int64_t count = kFull ? kGemmColumns : args.count;
    for (int64_t r = 0; r < kRows; ++r) {
        float* one = t + r * count;
        if (args.tensor_scale)
            args.bias != nullptr ? scale_sums<false, true>(args, row + r, count, one)
                                 : scale_sums<false, false>(args, row + r, count, one);
        else
            args.bias != nullptr ? scale_sums<true, true>(args, row + r, count, one)
                                 : scale_sums<true, false>(args, row + r, count, one);
    }
    if (args.activation == Activation::relu)
        for (int64_t c = 0; c < kRows * count; ++c) t[c] = t[c] < 0.0f ? 0.0f : t[c];  // a NaN stays one
    if (args.activation == Activation::gelu) gelu_of(t, kRows * count);
    for (int64_t r = 0; r < kRows; ++r) {
        float* one = t + r * count;
        const int64_t at = (row + r) * args.stride;
        if (args.residual != nullptr) {
            float other[kGemmColumns];
            Ops::widen(args.residual + at * element_bytes(args.residual_dtype), args.residual_dtype, count,
                       other);
            for (int64_t c = 0; c < count; ++c) one[c] = one[c] + other[c];
        }
        Ops::narrow(one, count, args.y + at * element_bytes(args.y_dtype), args.y_dtype);
    }
}

template <typename Ops, bool kFull>
DQK_TARGET inline void finish_rows(const GemmEpilogue& args) {
    const int64_t bytes = element_bytes(args.y_dtype);
    int64_t row = 0;
    for (; row + kEpilogueRows <= args.rows; row += kEpilogueRows) {
        for (int64_t ahead = row + kRowsAhead; ahead < row + kRowsAhead + kEpilogueRows; ++ahead)
            if (ahead < args.rows) ask_for(args.y + ahead * args.stride * bytes, args.count * bytes);
        finish<Ops, kEpilogueRows, kFull>(args, row);
    }
    for (; row < args.rows; ++row) finish<Ops, 1, kFull>(args, row);
}

template <typename Ops>
DQK_TARGET void epilogue(const GemmEpilogue& args) {
    if (args.count == kGemmColumns) {
        finish_rows<Ops, true>(args);
    } else {
        finish_rows<Ops, false>(args);
    }
}

// ---- rows of a table -------------------------------------------------------------------------------------

template <typename Ops, typename F>
DQK_TARGET void embed(const EmbeddingRow& args) {
    constexpr int64_t kRun = block_bytes(F::kBits);
    for (int64_t first = 0; first < args.k; first += kBlockK) {
        const uint8_t* packed = args.packed + first / planes(F::kBits);
        float t[kBlockK], other[kBlockK];
        for (int32_t p = 0; p < planes(F::kBits); ++p)
            for (int64_t j = 0; j < kRun; ++j) {
                const int32_t code = code_of(packed[j], F::kBits, p);
                t[p * kRun + j] = static_cast<float>(F::kFactor == 2 ? 2 * code + 1 : code);
            }
        const int64_t count = args.k - first < kBlockK ? args.k - first : kBlockK;
        if (args.mult != nullptr)  // an exact integer: a level is at most 8, a multiplier 127
            for (int64_t c = 0; c < count; c += args.group_size) {
                const float mult = static_cast<float>(args.mult[(first + c) / args.group_size]);
                for (int64_t e = c; e < c + args.group_size; ++e) t[e] = t[e] * mult;
            }
        for (int64_t c = 0; c < count; ++c) t[c] = t[c] * args.scale;
        if (args.embed_scale != 1.0f)
            for (int64_t c = 0; c < count; ++c) t[c] = t[c] * args.embed_scale;
        if (args.position != nullptr) {
            const auto* from =
                static_cast<const char*>(args.position) + first * element_bytes(args.position_dtype);
            Ops::widen(from, args.position_dtype, count, other);
            for (int64_t c = 0; c < count; ++c) t[c] = t[c] + other[c];
        }
        Ops::narrow(t, count, static_cast<char*>(args.y) + first * element_bytes(args.y_dtype), args.y_dtype);
    }
}

}  // namespace
}  // namespace dqk
