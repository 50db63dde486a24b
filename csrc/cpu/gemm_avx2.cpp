// The CPU GEMM for AVX2, which has no dot product of bytes: pairs of products are added in int16, exactly.
#if defined(__x86_64__)
#define DQK_TARGET __attribute__((target("avx2,f16c")))
#include "cpu/gemm_avx2.h"

namespace dqk {
namespace {

// Unsigned codes below 8: a pair of products is so small that kAdds of them fit in an int16 lane.
template <int64_t kAdds, int64_t kPanelAdds>
struct Narrow : Dot256 {
    using X = __m256i;
    static constexpr int64_t kSteps = kAdds, kPanelSteps = kPanelAdds;
    static constexpr int32_t kOffset8 = 0;               // not for 8-bit weights
    static constexpr int32_t kMultiplierWord = 0x10001;  // for both int16 of a lane

    static DQK_TARGET inline void store_x(const int8_t* q, uint8_t* row, int64_t i) {
        store256(row, i, load256(q, 0));
    }
    static DQK_TARGET inline X load_x(const uint8_t* row, int64_t i) { return load256(row, i); }
    static DQK_TARGET inline Partial multiply(Partial p, Vec u, X x) {
        return _mm256_add_epi16(p, _mm256_maddubs_epi16(u, x));
    }
    static DQK_TARGET inline Partial negate(Partial p) { return _mm256_sub_epi16(zero(), p); }
    static DQK_TARGET inline Sum drain(Sum s, Partial p) {
        return _mm256_add_epi32(s, _mm256_madd_epi16(p, _mm256_set1_epi16(1)));
    }
    template <int kGroup>
    static DQK_TARGET inline __m256i multipliers(const int32_t* words) {
        return _mm256_set1_epi32(*words);
    }
    static DQK_TARGET inline Sum drain_scaled(Sum s, Partial p, __m256i m) {
        return _mm256_add_epi32(s, _mm256_madd_epi16(p, m));
    }

    // In a panel a lane's two int16 are two pairs of one column.
    static DQK_TARGET inline Sum drain_columns(Sum s, Partial p, __m256i m) { return drain_scaled(s, p, m); }
    // Pairs of activations, wherever in the span they stand, come to one int16 or the other: minus the offset
    // times each sum, which may wrap as the sums of products do.
    static DQK_TARGET inline int32_t start(const uint8_t* x, int64_t codes, int32_t offset) {
        __m256i sum = zero();
        for (int64_t i = 0; i < codes / 32; ++i) sum = multiply(sum, splat(offset), load256(x, i));
        __m128i words = _mm_add_epi16(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        words = _mm_add_epi16(words, _mm_shuffle_epi32(words, 0x4E));
        words = _mm_add_epi16(words, _mm_shuffle_epi32(words, 0xB1));
        return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), words));
    }
};
// Unsigned products: 2 * 15 * 128 * 8 and 2 * 6 * 128 * 20 are 30720. In a panel, where the start takes the
// offset off and a sum on its way may wrap, signed ones: 2 * 8 * 127 * 16 is 32512, 2 * 3 * 127 * 32 is
// 24384, and no pair of unsigned ones (2 * 15 * 128) saturates.
using Narrow4 = Narrow<8, 16>;
using Narrow2 = Narrow<20, 32>;

// 8-bit weights against one row: |x| is the unsigned operand and the weight takes the sign of x. A pair of
// products is at most 2 * 128 * 127, so that vpmaddubsw does not saturate.
struct Signed8 : Dot256 {
    struct X {
        __m256i x, magnitude;
    };
    static constexpr int64_t kXBytes = 2;
    static constexpr int32_t kOffset8 = 0;

    static DQK_TARGET inline void store_x(const int8_t* q, uint8_t* row, int64_t i) {
        const __m256i x = load256(q, 0);
        store256(row, 2 * i, x);
        store256(row, 2 * i + 1, _mm256_abs_epi8(x));
    }
    static DQK_TARGET inline X load_x(const uint8_t* row, int64_t i) {
        return {load256(row, 2 * i), load256(row, 2 * i + 1)};
    }
    template <typename F>
    static DQK_TARGET inline void unpack(const uint8_t* block, Vec (&u)[4]) {
        for (int j = 0; j < 4; ++j) u[j] = load256(block, j);
    }
    static DQK_TARGET inline Partial multiply(Partial p, Vec w, const X& x) {
        const __m256i pairs = _mm256_maddubs_epi16(x.magnitude, _mm256_sign_epi8(w, x.x));
        return _mm256_add_epi32(p, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static DQK_TARGET inline Sum drain(Sum s, Partial p) { return _mm256_add_epi32(s, p); }
};

// 8-bit weights against many rows: both operands as int16, even and odd bytes apart, for vpmaddwd. Widening
// costs more than the sign above, and is done once.
struct Wide8 : Dot256 {
    using X = __m256i;
    static constexpr int64_t kCodes = 16, kXBytes = 2;
    static constexpr int32_t kOffset8 = 0;

    static DQK_TARGET inline __m256i even(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
    static DQK_TARGET inline __m256i odd(__m256i v) { return _mm256_srai_epi16(v, 8); }

    static DQK_TARGET inline void store_x(const int8_t* q, uint8_t* row, int64_t i) {
        const __m256i x = load256(q, 0);
        store256(row, 2 * i, even(x));
        store256(row, 2 * i + 1, odd(x));
    }
    static DQK_TARGET inline X load_x(const uint8_t* row, int64_t i) { return load256(row, i); }
    template <typename F>
    static DQK_TARGET inline void unpack(const uint8_t* block, Vec (&u)[8]) {
        for (int j = 0; j < 4; ++j) {
            const __m256i w = load256(block, j);
            u[2 * j] = even(w);
            u[2 * j + 1] = odd(w);
        }
    }
    static DQK_TARGET inline Partial multiply(Partial p, Vec w, X x) {
        return _mm256_add_epi32(p, _mm256_madd_epi16(w, x));
    }
    static DQK_TARGET inline Sum drain(Sum s, Partial p) { return _mm256_add_epi32(s, p); }
    // In a panel the even and odd codes of 32 are 8 steps each, as in a row of activations.
    template <typename F>
    static DQK_TARGET inline void pack_block(const uint8_t* rows, int64_t row_bytes, uint8_t* panel,
                                             int64_t step) {
        for (int j = 0; j < 4; ++j) {
            __m256i words[8];
            for (int r = 0; r < 8; ++r) words[r] = load256(rows + r * row_bytes, j);
            transpose256(words);
            for (int i = 0; i < 8; ++i) {
                store256(panel + (16 * j + i) * step, 0, even(words[i]));
                store256(panel + (16 * j + 8 + i) * step, 0, odd(words[i]));
            }
        }
    }
};

struct Avx2 : Convert256 {
    using One8 = Signed8;
    using Many8 = Wide8;
    using Narrow4 = dqk::Narrow4;
    using Narrow2 = dqk::Narrow2;
};

}  // namespace

const GemmKernel& avx2_gemm() {
    static constexpr GemmKernel kernel = kernel_of<Avx2>("avx2");
    return kernel;
}

}  // namespace dqk
#endif
