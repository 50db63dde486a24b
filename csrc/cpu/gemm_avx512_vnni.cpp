// The CPU GEMM for AVX-512 with VNNI: vpdpbusd on 512 bits. Run and measured on a Zen 4; in CI over modelled
// instructions too (tests/sim/avx512_model.h), since few machines have them.
#if defined(__x86_64__)
#define DQK_TARGET __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#include "cpu/gemm_avx2.h"

namespace dqk {
namespace {

DQK_TARGET inline __m512i load512(const void* base, int64_t i) {
    return _mm512_loadu_si512(static_cast<const __m512i*>(base) + i);
}
DQK_TARGET inline void store512(void* base, int64_t i, __m512i v) {
    _mm512_storeu_si512(static_cast<__m512i*>(base) + i, v);
}
DQK_TARGET inline __m512i both(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

struct Dot512 : InRegisters {
    using Vec = __m512i;
    using X = __m512i;
    using Sum = __m512i;
    using Partial = __m512i;
    static constexpr int64_t kCodes = 64, kGrain = 64, kXBytes = 1, kVecBytes = 64, kSteps = 0;
    static constexpr int kTokens = 4;
    static constexpr int kPanelRows = 12;  // 24 sums of 32 registers
    static constexpr int64_t kPanelSteps = 0;
    static constexpr int32_t kOffset8 = 128, kMultiplierWord = 1;

    static DQK_TARGET inline Sum sum_zero() { return _mm512_setzero_si512(); }
    static DQK_TARGET inline Partial zero() { return _mm512_setzero_si512(); }
    static DQK_TARGET inline Vec splat(int32_t code) { return _mm512_set1_epi8(static_cast<char>(code)); }
    static DQK_TARGET inline Vec load(const uint8_t* base, int64_t i) { return load512(base, i); }
    static DQK_TARGET inline void store(Vec v, uint8_t* base, int64_t i) { store512(base, i, v); }
    static DQK_TARGET inline void store_x(const int8_t* q, uint8_t* row, int64_t i) {
        store512(row, i, load512(q, 0));
    }
    static DQK_TARGET inline X load_x(const uint8_t* row, int64_t i) { return load512(row, i); }
    static DQK_TARGET inline Partial load_partial(const uint8_t* base, int64_t i) { return load512(base, i); }
    static DQK_TARGET inline void store_partial(Partial p, uint8_t* base, int64_t i) { store512(base, i, p); }

    static DQK_TARGET inline Partial multiply(Partial p, Vec u, X x) { return _mm512_dpbusd_epi32(p, u, x); }
    static DQK_TARGET inline Partial negate(Partial p) { return _mm512_sub_epi32(zero(), p); }
    static DQK_TARGET inline Sum drain(Sum s, Partial p) { return _mm512_add_epi32(s, p); }
    // A vector holds two groups of 32, or part of one.
    template <int kGroup>
    static DQK_TARGET inline __m512i multipliers(const int32_t* words) {
        return both(_mm256_set1_epi32(words[0]), _mm256_set1_epi32(words[kGroup == 32 ? 1 : 0]));
    }
    // A group's sum fits in the low int16 of its lane (8 products of at most 15 * 128), which vpmaddwd
    // multiplies.
    static DQK_TARGET inline Sum drain_scaled(Sum s, Partial p, __m512i m) {
        return _mm512_add_epi32(s, _mm512_madd_epi16(p, m));
    }

    // In a panel a lane holds the whole sum of a group.
    static DQK_TARGET inline Sum drain_columns(Sum s, Partial p, __m512i m) {
        return _mm512_add_epi32(s, _mm512_mullo_epi32(p, m));
    }
    static DQK_TARGET inline X broadcast(const uint8_t* word) {
        int32_t value;
        std::memcpy(&value, word, sizeof value);
        return _mm512_set1_epi32(value);
    }
    static DQK_TARGET inline Partial broadcast_start(const uint8_t* word) { return broadcast(word); }
    static DQK_TARGET inline Sum load_sum(const int32_t* from) { return load512(from, 0); }
    static DQK_TARGET inline void store_sum(Sum s, int32_t* to) { store512(to, 0, s); }
    static DQK_TARGET inline int32_t start(const uint8_t* x, int64_t codes, int32_t offset) {
        return start256(x, codes, offset);
    }
    template <typename F>
    static DQK_TARGET inline void pack_block(const uint8_t* rows, int64_t row_bytes, uint8_t* panel,
                                             int64_t step) {
        pack256<F>(rows, row_bytes, panel, step);
    }

    static DQK_TARGET inline void pin([[maybe_unused]] Partial& p) {
#if !defined(DQK_AVX512_MODEL)  // tests/sim/avx512_model.h: no register holds it
        __asm__ volatile("" : "+v"(p));
#endif
    }
    static DQK_TARGET inline __m128i reduced(const Sum (&s)[kGemmRows]) {
        __m256i halves[kGemmRows];
        for (int64_t r = 0; r < kGemmRows; ++r)
            halves[r] = _mm256_add_epi32(_mm512_castsi512_si256(s[r]), _mm512_extracti64x4_epi64(s[r], 1));
        return reduce256(halves);
    }
    static DQK_TARGET inline void reduce(const Sum (&s)[kGemmRows], int32_t* acc) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(acc), reduced(s));
    }
    static DQK_TARGET inline void add_reduced(const Sum (&s)[kGemmRows], int32_t* acc) {
        __m128i* to = reinterpret_cast<__m128i*>(acc);
        _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), reduced(s)));
    }

    // (v & mask) ^ flip
    static DQK_TARGET inline Vec masked(Vec v, Vec mask, Vec flip) {
        return _mm512_ternarylogic_epi32(v, mask, flip, 0x6A);
    }
    static DQK_TARGET inline Vec bytes(int32_t value) { return _mm512_set1_epi8(static_cast<char>(value)); }
    static DQK_TARGET inline Vec halves(int32_t low, int32_t high) {
        return both(_mm256_set1_epi8(static_cast<char>(low)), _mm256_set1_epi8(static_cast<char>(high)));
    }
    static DQK_TARGET inline Vec shifts(int32_t low, int32_t high) {
        return both(_mm256_set1_epi32(low), _mm256_set1_epi32(high));
    }

    // The 128 codes of a block as unsigned bytes, in the order of k.
    template <typename F>
    static DQK_TARGET inline void unpack(const uint8_t* block, Vec (&u)[2]) {
        if constexpr (F::kBits == 8) {
            for (int j = 0; j < 2; ++j) u[j] = _mm512_xor_si512(load512(block, j), bytes(0x80));
        } else if constexpr (F::kBits == 4) {
            const Vec v = load512(block, 0);
            u[0] = masked(v, bytes(0x0F), bytes(0x08));
            u[1] = masked(_mm512_srli_epi16(v, 4), bytes(0x0F), bytes(0x08));
        } else {
            // 32 bytes hold the block: planes 0 and 1 side by side, then planes 2 and 3.
            const Vec v = _mm512_broadcast_i64x4(load256(block, 0));
            for (int j = 0; j < 2; ++j) {
                const Vec shift = both(_mm256_set1_epi16(static_cast<int16_t>(4 * j)),
                                       _mm256_set1_epi16(static_cast<int16_t>(4 * j + 2)));
                u[j] = masked(_mm512_srlv_epi16(v, shift), bytes(0x03), bytes(0x02));
                if (F::kFactor == 2) u[j] = _mm512_add_epi8(u[j], u[j]);
            }
        }
    }

    // The same where they lie: at 4 bits u[1] is 16 times its codes, at 2 bits the halves of u[0] are 1 and 4
    // times theirs and those of u[1] 16 and 64 times.
    template <typename F>
    static DQK_TARGET inline void fields(const uint8_t* block, Vec (&u)[2]) {
        if constexpr (F::kBits == 8) {
            unpack<F>(block, u);
        } else if constexpr (F::kBits == 4) {
            Vec v = load512(block, 0);
            pin(v);  // one load: GCC would rather read it twice than copy it, and loads are what runs short
            u[0] = masked(v, bytes(0x0F), bytes(0x08));
            u[1] = masked(v, bytes(0xF0), bytes(0x80));
        } else {
            Vec v = _mm512_broadcast_i64x4(load256(block, 0));
            pin(v);
            u[0] = masked(v, halves(0x03, 0x0C), halves(0x02, 0x08));
            u[1] = masked(v, halves(0x30, 0xC0), halves(0x20, 0x80));
        }
    }
    template <typename F>
    static DQK_TARGET inline Sum merge(Sum a, Sum b) {
        if constexpr (F::kBits == 8) {
            return _mm512_add_epi32(a, b);
        } else if constexpr (F::kBits == 4) {
            return _mm512_add_epi32(a, _mm512_srai_epi32(b, 4));
        } else if constexpr (F::kFactor == 1) {
            return _mm512_add_epi32(_mm512_srav_epi32(a, shifts(0, 2)), _mm512_srav_epi32(b, shifts(4, 6)));
        } else {
            return _mm512_add_epi32(_mm512_srav_epi32(_mm512_add_epi32(a, a), shifts(0, 2)),
                                    _mm512_srav_epi32(b, shifts(3, 5)));
        }
    }
};

struct Avx512Vnni : Convert256 {
    using One8 = Dot512;
    using Many8 = Dot512;
    using Narrow4 = Dot512;
    using Narrow2 = Dot512;
};

}  // namespace

const GemmKernel& avx512_vnni_gemm() {
    static constexpr GemmKernel kernel = kernel_of<Avx512Vnni>("avx512_vnni");
    return kernel;
}

}  // namespace dqk
#endif
