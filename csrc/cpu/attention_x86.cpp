// The loops of attention.h for AVX2, and for the two instruction sets with a dot product of bytes (VNNI), on
// vectors of the same width: they differ in that one operation, in what it asks of keys, and in how many
// registers hold sums. AVX512-VNNI ran on a Zen 4, AVX-VNNI over modelled instructions only
// (tests/sim/avx512_model.h).
//
// The instruction set is a function attribute, not a flag of this file (quantize_x86.cpp says why).
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstring>
#include <utility>

#include "cpu/attention.h"
#include "cpu/prefetch.h"
#include "cpu/share.h"

namespace dqk {
namespace {

// For each set of zeros among 8 bytes: the places of the others, and how many they are.
struct Kept {
    uint8_t lanes[256][8];
    uint8_t count[256];
};

constexpr Kept kept() {
    Kept table = {};
    for (int zeros = 0; zeros < 256; ++zeros)
        for (uint8_t lane = 0; lane < 8; ++lane)
            if (((zeros >> lane) & 1) == 0) table.lanes[zeros][table.count[zeros]++] = lane;
    return table;
}

constexpr Kept kKept = kept();

}  // namespace
}  // namespace dqk

#define DQK_NAMESPACE attention_avx2
#define DQK_VNNI 0
#define DQK_REGISTERS 16
#define DQK_TARGET __attribute__((target("avx2,f16c")))
#define DQK_DOT4                                                                       \
    DQK_TARGET inline __m256i dot4(__m256i sums, __m256i u, __m256i s) {               \
        const __m256i pairs = _mm256_maddubs_epi16(u, s);                              \
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); \
    }
#include "cpu/attention_vector.inl"

#define DQK_NAMESPACE attention_avx_vnni
#define DQK_VNNI 1
#define DQK_REGISTERS 16
#define DQK_TARGET __attribute__((target("avx2,f16c,avxvnni")))
#define DQK_DOT4                                                         \
    DQK_TARGET inline __m256i dot4(__m256i sums, __m256i u, __m256i s) { \
        return _mm256_dpbusd_avx_epi32(sums, u, s);                      \
    }
#include "cpu/attention_vector.inl"

#define DQK_NAMESPACE attention_avx512_vnni
#define DQK_VNNI 1
#define DQK_REGISTERS 32
#define DQK_TARGET __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define DQK_DOT4                                                         \
    DQK_TARGET inline __m256i dot4(__m256i sums, __m256i u, __m256i s) { \
        return _mm256_dpbusd_epi32(sums, u, s);                          \
    }
#include "cpu/attention_vector.inl"

namespace dqk {

const AttentionFunctions& avx2_attention_functions() {
    return attention_avx2::kFunctions;
}

const AttentionFunctions& avx_vnni_attention_functions() {
    return attention_avx_vnni::kFunctions;
}

const AttentionFunctions& avx512_vnni_attention_functions() {
    return attention_avx512_vnni::kFunctions;
}

}  // namespace dqk
#endif
