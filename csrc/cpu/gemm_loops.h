// What one instruction set offers the CPU GEMM: a few loops for each weight format. Everything else, once, is
// in gemm.cpp; the loops themselves are templates (gemm_kernel.h), made for an instruction set in gemm_*.cpp.
#pragma once
#include <cstdint>

#include "dqk/api.h"

namespace dqk {

// The weight formats that differ in their loops: W8; W4, W2 and four_level W2, each without groups and in
// groups of 32, 64 and 128.
constexpr int32_t kGemmFormats = 13;
constexpr int32_t gemm_format(int32_t bits, bool four_level, int32_t group_size) {
    const int32_t group = group_size / 32;  // 0, 1, 2, 4
    return bits == 8 ? 0 : (bits == 4 ? 1 : four_level ? 9 : 5) + (group == 4 ? 3 : group);
}

// Columns that `many` finishes at a time, and rows of weights that share one walk along K.
constexpr int64_t kGemmColumns = 32;
constexpr int64_t kGemmRows = 4;
// Rows of the result that are asked for ahead of the one that is written.
constexpr int64_t kRowsAhead = 8;

struct GemmWeights {
    const uint8_t* rows;  // packed v1
    int64_t row_bytes;
    int64_t blocks;       // of 128 codes
    int64_t n;            // without padding
    const uint8_t* mult;  // [n, groups], or nullptr
    int64_t groups;
    int32_t group_size;
};

// Weights become unsigned bytes (code + offset) on their way into a dot product, because that is what the
// instructions take. The offset comes off through the activations: without groups as offset * row_sum from
// the int32 sum, with groups in the values that the sums of a group start from.
//
// A prepared row is q [k], padded to whole blocks and laid out for the loops, then those starting values.
//
// GemmSums: acc[m][c] = the sum of row m and column n0 + c, for c < count. acc has kGemmColumns columns, x
// `stride` bytes a row. `scratch` holds kGemmScratchBytes + 4 * kGemmColumns * gemm_words(), aligned to 64.
// The padding rows of the weights are read like any other, up to a multiple of 8.
using GemmSums = void (*)(const uint8_t* x, int64_t stride, int64_t m, const GemmWeights& w, int64_t n0,
                          int64_t count, int32_t* acc, uint8_t* scratch);
struct GemmLoops {
    int32_t offset;                        // what gemm.cpp takes off: 0 with groups
    int64_t (*row_bytes)(int64_t blocks);  // of a prepared row
    void (*prepare)(const int8_t* q, int64_t k, int64_t blocks, uint8_t* row);
    GemmSums sums;
    int64_t from_rows;  // of x: fewer do better by the loops before these
};
// One row of unpacked weights: four of them stay in the first cache, 64 bytes off the multiple of 4096 at
// which they would share its sets.
constexpr int64_t kGemmPanelBytes = 4096, kGemmPanelStride = kGemmPanelBytes + 64;
// A panel (gemm_panel.h): two vectors of columns at a time, and half of the first cache.
constexpr int kPanelVecs = 2;
constexpr int64_t kGemmPanelScratch = 16384;
constexpr int64_t kGemmScratchBytes = kGemmRows * kGemmPanelStride;
static_assert(kGemmPanelScratch <= kGemmScratchBytes, "a panel fits where four rows do");

// Multipliers of a row of weights that the loops read, with those behind the last group.
constexpr int64_t gemm_words(int64_t blocks, int32_t group_size) {
    return group_size == 0 ? 0 : blocks * (128 / group_size);
}

// The epilogue of a tile: `rows` rows, `count` <= kGemmColumns columns of each.
struct GemmEpilogue {
    int64_t rows;
    int64_t count;
    const int32_t* acc;         // [rows, kGemmColumns]
    const int32_t* add;         // [rows], to every sum
    const float* act_scale;     // [rows]
    const float* weight_scale;  // [count], or [1]
    bool tensor_scale;
    const float* bias;     // [count], or nullptr
    const char* residual;  // of the first row, or nullptr
    DType residual_dtype;
    Activation activation;
    char* y;  // of the first row
    DType y_dtype;
    int64_t stride;  // between rows of residual and y, in elements
};

// A row of a packed table, as floats.
struct EmbeddingRow {
    const uint8_t* packed;  // of the row
    int64_t k;
    float scale;
    const uint8_t* mult;  // of the row, or nullptr
    int32_t group_size;
    float embed_scale;
    const void* position;  // of the row, or nullptr
    DType position_dtype;
    void* y;
    DType y_dtype;
};

struct GemmKernel {
    const char* name;
    GemmLoops one[kGemmFormats];  // for a single row: unpacks the weights on the way, m is 1
    GemmLoops few[kGemmFormats];  // unpacks four rows of weights at a time, for all or for four rows of x
    // unpacks a panel of columns at a time, which costs more, and loses less; for activations within +-127
    GemmLoops many[kGemmFormats];
    void (*widen)(const void* from, DType dtype, int64_t count, float* to);  // elements of any type
    void (*epilogue)(const GemmEpilogue& args);
    void (*embed[4])(const EmbeddingRow& args);  // W8, W4, W2, four_level W2
};

// Whether a call takes long enough for more than one thread.
bool worth_sharing(const CpuGemm& args);

// kernel: 0 for the one of active_isa(), 1 + i for gemm_kernel_name(i).
Status find_gemm_kernel(int32_t kernel, const GemmKernel** found);

const GemmKernel& scalar_gemm();
#if defined(__x86_64__)
const GemmKernel& avx2_gemm();
const GemmKernel& avx_vnni_gemm();
const GemmKernel& avx512_vnni_gemm();
const GemmKernel& amx_int8_gemm();
#endif
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
const GemmKernel& dotprod_gemm();
#endif
#if defined(DQK_SIM)
const GemmKernel& model_avx_vnni_gemm();
const GemmKernel& model_avx512_vnni_gemm();
const GemmKernel& model_amx_gemm();
const GemmKernel& model_dotprod_gemm();
#endif

}  // namespace dqk
