// The CPU GEMM for AMX: 16 x 16 int32 sums of 64 products each in one instruction. From kTileRows rows of x
// on; fewer take the loops of AVX-512 with VNNI, whose prepared rows, offsets, epilogue and tables these are.
//
// Weights are unpacked and transposed into tiles once for all rows of x, kPanelSteps of 64 codes at a time:
// row i of a tile holds codes 4i .. 4i + 3 of its 16 columns. Without groups these are the unsigned codes, in
// 32 columns. With groups they are level times multiplier, at most 8 * 127, in two bytes: product = 128 high
// + low, with low in 0 .. 127. The second 16 columns then hold the high bytes, and sums need no scaling on
// the way.
#if defined(__x86_64__)
#ifndef DQK_TARGET
#define DQK_TARGET __attribute__((target("avx2,f16c,amx-tile,amx-int8")))
#endif
#include "cpu/gemm_avx2.h"

namespace dqk {
namespace {

// Not measured: a panel costs as much as many_sums' own unpacking, and a tile of few rows is mostly empty.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTile = 16, kTileBytes = 1024, kStepCodes = 64;
constexpr int64_t kPanelSteps = 8, kPanelBlocks = kPanelSteps * kStepCodes / kBlockK;
static_assert(kPanelSteps * 2 * kTileBytes <= kGemmScratchBytes, "the panel is the scratch of the table");

// What ldtilecfg reads. Tiles 0 .. 3: sums of rows 0 .. 15 (0, 1) and 16 .. 31 (2, 3); 4 and 5: x; 6 and 7:
// weights.
struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// gcc's intrinsics do not say that they read memory: what was stored for them has to be there.
DQK_TARGET inline void stored(const void* memory) {
    __asm__ volatile("" : : "r"(memory) : "memory");
}

DQK_TARGET inline void configure(int64_t rows) {
    TileConfig config = {};
    config.palette = 1;
    const auto first = static_cast<uint8_t>(rows < kTile ? rows : kTile);
    const auto second = static_cast<uint8_t>(rows - first);
    const uint8_t of_tile[8] = {first, first, second, second, first, second, 16, 16};
    for (int i = 0; i < 8; ++i) {
        config.rows[i] = of_tile[i];
        config.row_bytes[i] = of_tile[i] == 0 ? 0 : 64;
    }
    stored(&config);
    _tile_loadconfig(&config);
}

// sums[m][c] += x · panel for `rows` rows and the 32 columns of the panel.
template <bool kSigned, bool kBoth>
DQK_TARGET void tiles(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t steps, int32_t* sums) {
    constexpr int64_t kSumBytes = kGemmColumns * static_cast<int64_t>(sizeof(int32_t));
    stored(sums);
    _tile_loadd(0, sums, kSumBytes);
    _tile_loadd(1, sums + kTile, kSumBytes);
    if constexpr (kBoth) {
        _tile_loadd(2, sums + kTile * kGemmColumns, kSumBytes);
        _tile_loadd(3, sums + kTile * kGemmColumns + kTile, kSumBytes);
    }
    for (int64_t s = 0; s < steps; ++s) {
        _tile_loadd(4, x + s * kStepCodes, stride);
        _tile_loadd(6, panel + 2 * s * kTileBytes, 64);
        _tile_loadd(7, panel + (2 * s + 1) * kTileBytes, 64);
        if constexpr (kSigned) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
        } else {
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
        }
        if constexpr (kBoth) {
            _tile_loadd(5, x + kTile * stride + s * kStepCodes, stride);
            if constexpr (kSigned) {
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            } else {
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, kSumBytes);
    _tile_stored(1, sums + kTile, kSumBytes);
    if constexpr (kBoth) {
        _tile_stored(2, sums + kTile * kGemmColumns, kSumBytes);
        _tile_stored(3, sums + kTile * kGemmColumns + kTile, kSumBytes);
    }
}

// ---- the panel -------------------------------------------------------------------------------------------

// 32 bytes of 8 columns, `pitch` bytes apart -> 8 rows of a tile (64 bytes apart), half of each.
DQK_TARGET inline void transpose(const uint8_t* from, int64_t pitch, uint8_t* to) {
    __m256i words[8];
    for (int i = 0; i < 8; ++i) words[i] = load256(from + i * pitch, 0);
    transpose256(words);
    for (int i = 0; i < 8; ++i) store256(to + i * 64, 0, words[i]);
}

// bytes [16 columns][128 codes] -> the tiles of two steps, every other tile of the panel.
DQK_TARGET inline void store_tiles(const uint8_t* bytes, uint8_t* panel) {
    for (int64_t s = 0; s < 2; ++s)
        for (int64_t k = 0; k < 2; ++k)
            for (int64_t c = 0; c < 2; ++c)
                transpose(bytes + c * 8 * kBlockK + s * kStepCodes + k * 32, kBlockK,
                          panel + s * 2 * kTileBytes + k * 8 * 64 + c * 32);
}

// Signed levels times a multiplier of at most 127, as two signed bytes.
DQK_TARGET inline void split(__m256i level, int32_t mult, __m256i* low, __m256i* high) {
    const __m256i m = _mm256_set1_epi16(static_cast<int16_t>(mult)), none = _mm256_setzero_si256();
    const __m256i a = _mm256_mullo_epi16(_mm256_srai_epi16(_mm256_unpacklo_epi8(none, level), 8), m);
    const __m256i b = _mm256_mullo_epi16(_mm256_srai_epi16(_mm256_unpackhi_epi8(none, level), 8), m);
    const __m256i mask = _mm256_set1_epi16(127);
    *low = _mm256_packs_epi16(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    *high = _mm256_packs_epi16(_mm256_srai_epi16(a, 7), _mm256_srai_epi16(b, 7));
}

// Blocks first .. first + blocks of columns n .. n + 15, of which `count` (a multiple of 4) are read; the
// others are zeros.
template <typename F, int kGroup>
DQK_TARGET void build_panel(const GemmWeights& w, int64_t n, int64_t count, int64_t first, int64_t blocks,
                            uint8_t* panel) {
    alignas(64) uint8_t bytes[2][kTile * kBlockK] = {};
    for (int64_t b = 0; b < blocks; ++b, panel += 4 * kTileBytes) {
        for (int64_t c = 0; c < count; ++c) {
            __m256i u[4];
            unpack256<F>(w.rows + (n + c) * w.row_bytes + (first + b) * block_bytes(F::kBits), u);
            if constexpr (kGroup == 0) {
                for (int j = 0; j < 4; ++j) store256(bytes[0] + c * kBlockK, j, u[j]);
            } else {
                const uint8_t* mult = w.mult + (n + c < w.n ? n + c : w.n - 1) * w.groups;
                const __m256i offset = _mm256_set1_epi8(static_cast<char>(F::kOffset));
                for (int j = 0; j < 4; ++j) {
                    const int64_t g = ((first + b) * kBlockK + 32 * j) / kGroup;
                    __m256i low, high;
                    split(_mm256_sub_epi8(u[j], offset), g < w.groups ? mult[g] : 0, &low, &high);
                    store256(bytes[0] + c * kBlockK, j, low);
                    store256(bytes[1] + c * kBlockK, j, high);
                }
            }
        }
        store_tiles(bytes[0], panel);
        if constexpr (kGroup > 0) store_tiles(bytes[1], panel + kTileBytes);
    }
}

// ---- sums ------------------------------------------------------------------------------------------------

// The panel against all rows of x, 32 at a time, onto acc: straight, or by way of both bytes' sums.
template <int kGroup>
DQK_TARGET void multiply_panel(const uint8_t* x, int64_t stride, int64_t m, const uint8_t* panel,
                               int64_t steps, int32_t* acc) {
    stored(panel);
    int64_t configured = 0;
    for (int64_t i = 0; i < m; i += 2 * kTile) {
        const int64_t rows = m - i < 2 * kTile ? m - i : 2 * kTile;
        if (rows != configured) configure(configured = rows);
        int32_t* to = acc + i * kGemmColumns;
        alignas(64) int32_t parts[2 * kTile * kGemmColumns];
        if constexpr (kGroup > 0) std::memset(parts, 0, sizeof parts);
        int32_t* sums = kGroup > 0 ? parts : to;
        if (rows > kTile) {
            tiles<(kGroup > 0), true>(x + i * stride, stride, panel, steps, sums);
        } else {
            tiles<(kGroup > 0), false>(x + i * stride, stride, panel, steps, sums);
        }
        if constexpr (kGroup > 0) {
            stored(parts);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < kTile; ++c) {
                    const auto high = static_cast<uint32_t>(parts[r * kGemmColumns + kTile + c]);
                    const auto sum = static_cast<uint32_t>(parts[r * kGemmColumns + c]) + (high << 7);
                    to[r * kGemmColumns + c] = wrap_add(to[r * kGemmColumns + c], static_cast<int32_t>(sum));
                }
        }
    }
}

template <typename F, int kGroup>
DQK_TARGET void amx_sums(const uint8_t* x, int64_t stride, int64_t m, const GemmWeights& w, int64_t n0,
                         int64_t count, int32_t* acc, uint8_t* scratch) {
    if (m < kTileRows) {
        const int32_t format = gemm_format(F::kBits, F::kBits == 2 && F::kFactor == 2, kGroup);
        avx512_vnni_gemm().few[format].sums(x, stride, m, w, n0, count, acc, scratch);
        return;
    }
    std::memset(acc, 0, static_cast<size_t>(m * kGemmColumns) * sizeof(int32_t));
    const int64_t readable = (count + kGemmRows - 1) / kGemmRows * kGemmRows;
    for (int64_t first = 0; first < w.blocks; first += kPanelBlocks) {
        const int64_t blocks = first + kPanelBlocks < w.blocks ? kPanelBlocks : w.blocks - first;
        const uint8_t* at = x + first * kBlockK;
        for (int64_t c = 0; c < readable; c += kTile) {
            const int64_t columns = readable - c < kTile ? readable - c : kTile;
            uint8_t* to = scratch + (kGroup == 0 && c > 0 ? kTileBytes : 0);
            build_panel<F, kGroup>(w, n0 + c, columns, first, blocks, to);
            if constexpr (kGroup > 0) multiply_panel<kGroup>(at, stride, m, scratch, 2 * blocks, acc + c);
        }
        if constexpr (kGroup == 0) {
            if (readable <= kTile)  // nothing behind the first 16 columns
                for (int64_t s = 0; s < 2 * blocks; ++s)
                    std::memset(scratch + (2 * s + 1) * kTileBytes, 0, kTileBytes);
            multiply_panel<0>(at, stride, m, scratch, 2 * blocks, acc);
        }
    }
    _tile_release();
}

GemmKernel amx_kernel() {
    GemmKernel kernel = avx512_vnni_gemm();
    kernel.name = "amx_int8";
    constexpr GemmSums kSums[kGemmFormats] = {
        amx_sums<W8, 0>,   amx_sums<W4, 0>,   amx_sums<W4, 32>,   amx_sums<W4, 64>,  amx_sums<W4, 128>,
        amx_sums<W2, 0>,   amx_sums<W2, 32>,  amx_sums<W2, 64>,   amx_sums<W2, 128>, amx_sums<W2F, 0>,
        amx_sums<W2F, 32>, amx_sums<W2F, 64>, amx_sums<W2F, 128>,
    };
    // Tiles read rows as the loops of few rows do, a byte for each code.
    for (int32_t i = 0; i < kGemmFormats; ++i) {
        kernel.many[i] = kernel.few[i];
        kernel.many[i].sums = kSums[i];
        kernel.many[i].from_rows = kTileRows;
    }
    return kernel;
}

}  // namespace

const GemmKernel& amx_int8_gemm() {
    static const GemmKernel kernel = amx_kernel();
    return kernel;
}

}  // namespace dqk
#endif
