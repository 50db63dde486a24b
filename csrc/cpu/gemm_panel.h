// The loops for many rows of activations, where the lanes of a register are columns of the result: 8 or 16
// rows of weights lie side by side in a panel, and each word of a row of activations (4 codes, or 2 of 16
// bits) is broadcast to all of them. So nothing is added across lanes, and a panel, unpacked once, serves
// every row.
//
//   panel: [step][kPanelVecs vectors][column][4 bytes]; step s meets word s of a prepared row
//
// Unsigned codes carry their offset through a span of steps in what its sums start from: the start, one word
// per row and span, is minus the offset times the activations. Only the sum at the end of a span has to fit
// then, which is that of signed products; on the way there int16 lanes may wrap.
#pragma once
#include <utility>

#include "cpu/gemm_kernel.h"

namespace dqk {
namespace {

template <typename Dot>
constexpr int64_t panel_columns() {
    return kPanelVecs * Dot::kVecBytes / 4;
}
// Steps of a block of 128 codes: a word holds 4 codes, or 2 where activations take two bytes.
template <typename Dot>
constexpr int64_t block_steps() {
    return kBlockK * Dot::kXBytes / 4;
}
template <typename Dot>
constexpr int64_t step_bytes() {
    return kPanelVecs * Dot::kVecBytes;
}

// Steps between two looks at a partial sum: what it holds, or a group if that is less. 0: no spans.
template <typename Dot, int kGroup>
constexpr int64_t span_steps() {
    if (kGroup == 0) return Dot::kPanelSteps;
    return Dot::kPanelSteps > 0 && Dot::kPanelSteps < kGroup / 4 ? Dot::kPanelSteps : kGroup / 4;
}

// ---- rows of activations ---------------------------------------------------------------------------------

template <typename Dot, int kGroup>
int64_t panel_row_bytes(int64_t blocks) {
    int64_t bytes = blocks * kBlockK * Dot::kXBytes;
    if constexpr (span_steps<Dot, kGroup>() > 0)
        bytes += blocks * block_steps<Dot>() / span_steps<Dot, kGroup>() * 4;
    return (bytes + 63) / 64 * 64;
}

template <typename Dot, typename F, int kGroup>
DQK_TARGET void prepare_panel(const int8_t* q, int64_t k, int64_t blocks, uint8_t* row) {
    store_row<Dot>(q, k, blocks, row);
    if constexpr (span_steps<Dot, kGroup>() > 0) {
        constexpr int64_t kSpan = span_steps<Dot, kGroup>();
        uint8_t* starts = row + blocks * kBlockK;
        for (int64_t s = 0; s < blocks * block_steps<Dot>() / kSpan; ++s) {
            const int32_t word = Dot::start(row + s * kSpan * 4, kSpan * 4, offset_of<Dot, F>());
            std::memcpy(starts + s * 4, &word, 4);
        }
    }
}

// ---- tiles -----------------------------------------------------------------------------------------------

// What a tile stands on, all at the first of `steps` steps.
struct PanelWalk {
    const uint8_t* x;
    const uint8_t* starts;
    int64_t stride;  // of both
    const uint8_t* panel;
    int64_t steps;
    const int32_t* words;  // multipliers [group][column]
};

// The sums of kM rows of x and the columns of a panel: row m, vector j at place m * kPanelVecs + j. Places
// are spelled out when compiled, by folding over them: an array that loops go through stays in memory with
// GCC, and its 24 registers are stored and loaded again every other step.
template <typename Dot, int kM>
struct PanelSums {
    typename Dot::Partial at[kM * kPanelVecs];
};
template <int kM>
using Places = std::make_integer_sequence<int, kM * kPanelVecs>;
constexpr int row_of(int place) {
    return place / kPanelVecs;
}
constexpr int64_t vec_of(int place) {
    return place % kPanelVecs;
}
// Where they lie in acc.
template <typename Dot>
DQK_TARGET inline int32_t* sum_at(int32_t* acc, int place) {
    return acc + row_of(place) * kGemmColumns + vec_of(place) * (Dot::kVecBytes / 4);
}

template <typename Dot, int kM, int... kAt>
DQK_TARGET inline void pin_sums(PanelSums<Dot, kM>& part, std::integer_sequence<int, kAt...>) {
    (Dot::pin(part.at[kAt]), ...);
}
template <typename Dot, int kM, int... kAt>
DQK_TARGET inline void load_sums(const int32_t* acc, PanelSums<Dot, kM>& part,
                                 std::integer_sequence<int, kAt...>) {
    ((part.at[kAt] = Dot::load_sum(sum_at<Dot>(const_cast<int32_t*>(acc), kAt))), ...);
}
template <typename Dot, int kM, int... kAt>
DQK_TARGET inline void store_sums(const PanelSums<Dot, kM>& part, int32_t* acc,
                                  std::integer_sequence<int, kAt...>) {
    (Dot::store_sum(part.at[kAt], sum_at<Dot>(acc, kAt)), ...);
}
template <typename Dot, int kM, int... kAt>
DQK_TARGET inline void start_sums(const uint8_t* starts, int64_t stride, PanelSums<Dot, kM>& part,
                                  std::integer_sequence<int, kAt...>) {
    ((part.at[kAt] = Dot::broadcast_start(starts + row_of(kAt) * stride)), ...);
}
template <typename Dot, int kM, int... kAt>
DQK_TARGET inline void drain_sums(const PanelSums<Dot, kM>& part, int32_t* acc,
                                  std::integer_sequence<int, kAt...>) {
    (Dot::store_sum(Dot::drain(Dot::load_sum(sum_at<Dot>(acc, kAt)), part.at[kAt]), sum_at<Dot>(acc, kAt)),
     ...);
}
template <typename Dot, int kM, typename Multipliers, int... kAt>
DQK_TARGET inline void drain_sums_scaled(const PanelSums<Dot, kM>& part,
                                         const Multipliers (&multipliers)[kPanelVecs], int32_t* acc,
                                         std::integer_sequence<int, kAt...>) {
    (Dot::store_sum(
         Dot::drain_columns(Dot::load_sum(sum_at<Dot>(acc, kAt)), part.at[kAt], multipliers[vec_of(kAt)]),
         sum_at<Dot>(acc, kAt)),
     ...);
}

// One word of each row of x meets a vector of every column.
template <typename Dot, int kM, int... kAt>
DQK_TARGET inline void multiply_step(const uint8_t* x, int64_t stride, const uint8_t* panel,
                                     PanelSums<Dot, kM>& part, std::integer_sequence<int, kAt...>) {
    typename Dot::Vec w[kPanelVecs];
    for (int j = 0; j < kPanelVecs; ++j) w[j] = Dot::load(panel, j);
    ((part.at[kAt] = Dot::multiply(part.at[kAt], w[vec_of(kAt)], Dot::broadcast(x + row_of(kAt) * stride))),
     ...);
}

template <typename Dot, int kM>
DQK_TARGET inline void multiply_steps(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t steps,
                                      PanelSums<Dot, kM>& part) {
    pin_sums(part, Places<kM>());
    DQK_UNROLL_2
    for (int64_t s = 0; s < steps; ++s) {
        multiply_step(x + s * 4, stride, panel + s * step_bytes<Dot>(), part, Places<kM>());
        pin_sums(part, Places<kM>());
    }
}

// acc[m][c] += the sums of kM rows of x, from row m0 on, and the columns of the panel.
template <typename Dot, int kM, int kGroup>
DQK_TARGET __attribute__((noinline)) void panel_tile(const PanelWalk& walk, int64_t m0, int32_t* acc) {
    constexpr int64_t kSpan = span_steps<Dot, kGroup>();
    constexpr Places<kM> kPlaces;
    const uint8_t* x = walk.x + m0 * walk.stride;
    acc += m0 * kGemmColumns;
    PanelSums<Dot, kM> part;
    if constexpr (kSpan > 0) {
        const uint8_t* starts = walk.starts + m0 * walk.stride;
        for (int64_t first = 0; first < walk.steps; first += kSpan) {
            start_sums(starts + first / kSpan * 4, walk.stride, part, kPlaces);
            multiply_steps(x + first * 4, walk.stride, walk.panel + first * step_bytes<Dot>(), kSpan, part);
            if constexpr (kGroup > 0) {
                const int32_t* words = walk.words + first * 4 / kGroup * panel_columns<Dot>();
                decltype(Dot::load_sum(words)) multipliers[kPanelVecs];
                for (int j = 0; j < kPanelVecs; ++j)
                    multipliers[j] = Dot::load_sum(words + j * (Dot::kVecBytes / 4));
                drain_sums_scaled(part, multipliers, acc, kPlaces);
            } else {
                drain_sums(part, acc, kPlaces);
            }
        }
    } else {
        load_sums(acc, part, kPlaces);
        multiply_steps(x, walk.stride, walk.panel, walk.steps, part);
        store_sums(part, acc, kPlaces);
    }
}

// Multipliers of the panel's columns, group by group. Padding rows have none of their own; their sums are not
// used.
template <typename Dot>
DQK_TARGET void panel_words(const GemmWeights& w, int64_t n, int64_t groups, int32_t* words) {
    constexpr int64_t kColumns = panel_columns<Dot>();
    for (int64_t c = 0; c < kColumns; ++c) {
        const uint8_t* mult = w.mult + (n + c < w.n ? n + c : w.n - 1) * w.groups;
        for (int64_t g = 0; g < groups; ++g)
            words[g * kColumns + c] = g < w.groups ? mult[g] * Dot::kMultiplierWord : 0;
    }
}

template <typename Dot, typename F, int kGroup>
DQK_TARGET void panel_sums(const uint8_t* x, int64_t stride, int64_t rows, const GemmWeights& w, int64_t n0,
                           int64_t count, int32_t* acc, uint8_t* scratch) {
    constexpr int64_t kColumns = panel_columns<Dot>(), kSteps = block_steps<Dot>();
    constexpr int64_t kBlocks = kGemmPanelScratch / (kSteps * step_bytes<Dot>());  // that the panel holds
    constexpr int64_t kPackRows = 8;  // of weights, and padding comes in sixteens
    static_assert(kColumns <= kGemmColumns && kGemmColumns % kColumns == 0, "a panel is part of a tile");
    static_assert(kBlocks > 0, "the panel holds a block");
    int32_t* words = reinterpret_cast<int32_t*>(scratch + kGemmScratchBytes);
    std::memset(acc, 0, static_cast<size_t>(rows * kGemmColumns) * sizeof(int32_t));
    for (int64_t c = 0; c < count; c += kColumns) {
        if constexpr (kGroup > 0) panel_words<Dot>(w, n0 + c, gemm_words(w.blocks, kGroup), words);
        for (int64_t first = 0; first < w.blocks; first += kBlocks) {
            const int64_t blocks = first + kBlocks < w.blocks ? kBlocks : w.blocks - first;
            for (int64_t r = 0; r < kColumns; r += kPackRows) {
                if (c + r >= count) {  // columns that nobody reads
                    for (int64_t s = 0; s < blocks * kSteps; ++s)
                        std::memset(scratch + s * step_bytes<Dot>() + r * 4, 0, kPackRows * 4);
                    continue;
                }
                const uint8_t* from = w.rows + (n0 + c + r) * w.row_bytes + first * block_bytes(F::kBits);
                for (int64_t b = 0; b < blocks; ++b)
                    Dot::template pack_block<F>(from + b * block_bytes(F::kBits), w.row_bytes,
                                                scratch + b * kSteps * step_bytes<Dot>() + r * 4,
                                                step_bytes<Dot>());
            }
            // The next panel's weights, in another call perhaps, or another thread: far behind the first
            // cache.
            for (int64_t r = 0; r < kColumns && n0 + c + kColumns + r < w.n; ++r) {
                const uint8_t* next =
                    w.rows + (n0 + c + kColumns + r) * w.row_bytes + first * block_bytes(F::kBits);
                for (int64_t at = 0; at < blocks * block_bytes(F::kBits); at += 64)
                    __builtin_prefetch(next + at, 0, 2);
            }
            PanelWalk walk = {};
            walk.x = x + first * kBlockK * Dot::kXBytes;
            walk.stride = stride;
            walk.panel = scratch;
            walk.steps = blocks * kSteps;
            if constexpr (span_steps<Dot, kGroup>() > 0)
                walk.starts = x + w.blocks * kBlockK + first * kSteps / span_steps<Dot, kGroup>() * 4;
            if constexpr (kGroup > 0) walk.words = words + first * kBlockK / kGroup * kColumns;
            int64_t m = 0;
            for (; m + Dot::kPanelRows <= rows; m += Dot::kPanelRows)
                panel_tile<Dot, Dot::kPanelRows, kGroup>(walk, m, acc + c);
            for (; m + 2 <= rows; m += 2) panel_tile<Dot, 2, kGroup>(walk, m, acc + c);
            for (; m < rows; ++m) panel_tile<Dot, 1, kGroup>(walk, m, acc + c);
        }
    }
}

template <typename Dot, typename F, int kGroup = 0>
constexpr GemmLoops panel_loops() {
    return {span_steps<Dot, kGroup>() > 0 ? 0 : offset_of<Dot, F>(), panel_row_bytes<Dot, kGroup>,
            prepare_panel<Dot, F, kGroup>, panel_sums<Dot, F, kGroup>, 0};
}

}  // namespace
}  // namespace dqk
