// The CPU GEMM for AVX-VNNI: vpdpbusd on 256 bits. Run over modelled instructions
// (tests/sim/avx512_model.h), never on such a processor.
#if defined(__x86_64__)
#define DQK_TARGET __attribute__((target("avx2,f16c,avxvnni")))
#include "cpu/gemm_avx2.h"

namespace dqk {
namespace {

struct DotVnni : Dot256 {
    using X = __m256i;
    static constexpr int32_t kOffset8 = 128, kMultiplierWord = 1;

    static DQK_TARGET inline void store_x(const int8_t* q, uint8_t* row, int64_t i) {
        store256(row, i, load256(q, 0));
    }
    static DQK_TARGET inline X load_x(const uint8_t* row, int64_t i) { return load256(row, i); }
    static DQK_TARGET inline Partial multiply(Partial p, Vec u, X x) {
        return _mm256_dpbusd_avx_epi32(p, u, x);
    }
    static DQK_TARGET inline Partial negate(Partial p) { return _mm256_sub_epi32(zero(), p); }
    static DQK_TARGET inline Sum drain(Sum s, Partial p) { return _mm256_add_epi32(s, p); }
    template <int kGroup>
    static DQK_TARGET inline __m256i multipliers(const int32_t* words) {
        return _mm256_set1_epi32(*words);
    }
    // A group's sum fits in the low int16 of its lane (16 products of at most 15 * 128), which vpmaddwd
    // multiplies.
    static DQK_TARGET inline Sum drain_scaled(Sum s, Partial p, __m256i m) {
        return _mm256_add_epi32(s, _mm256_madd_epi16(p, m));
    }
    // In a panel a lane holds the whole sum of a group.
    static DQK_TARGET inline Sum drain_columns(Sum s, Partial p, __m256i m) {
        return _mm256_add_epi32(s, _mm256_mullo_epi32(p, m));
    }
};

struct AvxVnni : Convert256 {
    using One8 = DotVnni;
    using Many8 = DotVnni;
    using Narrow4 = DotVnni;
    using Narrow2 = DotVnni;
};

}  // namespace

const GemmKernel& avx_vnni_gemm() {
    static constexpr GemmKernel kernel = kernel_of<AvxVnni>("avx_vnni");
    return kernel;
}

}  // namespace dqk
#endif
