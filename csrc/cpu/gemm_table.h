// The table of an instruction set's loops (gemm_loops.h), made of the templates.
#pragma once
#include "cpu/gemm_kernel.h"
#include "cpu/gemm_panel.h"
#include "cpu/gemm_registers.h"

namespace dqk {
namespace {

// Loops over rows as `prepare` lays them out.
template <typename Dot, typename F, int kGroup>
constexpr GemmLoops row_loops(GemmSums sums, int64_t from_rows) {
    return {kGroup > 0 ? 0 : offset_of<Dot, F>(), row_bytes<Dot, F, kGroup>, prepare<Dot, F, kGroup>, sums,
            from_rows};
}
template <typename Dot, typename F, int kGroup = 0>
constexpr GemmLoops one_loops() {
    if constexpr (in_registers<Dot, kGroup>())
        return row_loops<Dot, F, kGroup>(one_sums_fields<Dot, F>, 1);
    else
        return row_loops<Dot, F, kGroup>(one_sums<Dot, F, kGroup>, 1);
}
template <typename Dot, typename F, int kGroup = 0>
constexpr GemmLoops few_loops() {
    if constexpr (in_registers<Dot, kGroup>())
        return row_loops<Dot, F, kGroup>(few_sums_registers<Dot, F>, 2);
    else
        return row_loops<Dot, F, kGroup>(few_sums<Dot, F, kGroup>, 2);
}

// A panel costs its making: where weights are multiplied as soon as they are unpacked it is worth it later.
template <typename Dot, typename F, int kGroup = 0>
constexpr GemmLoops many_loops() {
    GemmLoops loops = panel_loops<Dot, F, kGroup>();
    loops.from_rows = in_registers<Dot, kGroup>() ? 20 : 8;
    return loops;
}

// Ops names the dot of each use: One8 and Many8 for 8-bit weights, Narrow4 and Narrow2 for the others. The
// order is that of gemm_format().
template <typename Ops>
constexpr GemmKernel kernel_of(const char* name) {
    using D4 = typename Ops::Narrow4;
    using D2 = typename Ops::Narrow2;
    return {
        name,
        {one_loops<typename Ops::One8, W8>(), one_loops<D4, W4>(), one_loops<D4, W4, 32>(),
         one_loops<D4, W4, 64>(), one_loops<D4, W4, 128>(), one_loops<D2, W2>(), one_loops<D2, W2, 32>(),
         one_loops<D2, W2, 64>(), one_loops<D2, W2, 128>(), one_loops<D2, W2F>(), one_loops<D2, W2F, 32>(),
         one_loops<D2, W2F, 64>(), one_loops<D2, W2F, 128>()},
        {few_loops<typename Ops::Many8, W8>(), few_loops<D4, W4>(), few_loops<D4, W4, 32>(),
         few_loops<D4, W4, 64>(), few_loops<D4, W4, 128>(), few_loops<D2, W2>(), few_loops<D2, W2, 32>(),
         few_loops<D2, W2, 64>(), few_loops<D2, W2, 128>(), few_loops<D2, W2F>(), few_loops<D2, W2F, 32>(),
         few_loops<D2, W2F, 64>(), few_loops<D2, W2F, 128>()},
        {many_loops<typename Ops::Many8, W8>(), many_loops<D4, W4>(), many_loops<D4, W4, 32>(),
         many_loops<D4, W4, 64>(), many_loops<D4, W4, 128>(), many_loops<D2, W2>(), many_loops<D2, W2, 32>(),
         many_loops<D2, W2, 64>(), many_loops<D2, W2, 128>(), many_loops<D2, W2F>(),
         many_loops<D2, W2F, 32>(), many_loops<D2, W2F, 64>(), many_loops<D2, W2F, 128>()},
        Ops::widen,
        epilogue<Ops>,
        {embed<Ops, W8>, embed<Ops, W4>, embed<Ops, W2>, embed<Ops, W2F>}};
}

}  // namespace
}  // namespace dqk
