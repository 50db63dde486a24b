// The model of avx512_model.h, instruction by instruction, on random and edge values: against plain loops
// here, against the AVX2 instruction on each half where there is one, and against the instruction itself
// where the processor has it. Exit code 0 if all agree; prints a line for each.
#include "avx512_model.h"
//
#include <cpuid.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "dqk/rounding.h"

#define ON_AVX2 __attribute__((target("avx2,f16c")))
#define ON_AVX512 __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

namespace dqk::avx512_model {
namespace {

struct Half {
    uint8_t bytes[32];
};
template <typename To, typename From>
ON_AVX2 inline To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a register is a register");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// f(a, b, c) of every lane of type T.
template <typename T, typename F>
Ints each(const Ints& a, const Ints& b, const Ints& c, F f) {
    Ints out;
    for (size_t i = 0; i < 64; i += sizeof(T)) {
        T x, y, z;
        std::memcpy(&x, a.bytes + i, sizeof x);
        std::memcpy(&y, b.bytes + i, sizeof y);
        std::memcpy(&z, c.bytes + i, sizeof z);
        const T lane = f(x, y, z);
        std::memcpy(out.bytes + i, &lane, sizeof lane);
    }
    return out;
}
int64_t signed16(uint32_t word, int i) {
    return static_cast<int16_t>(word >> (16 * i));
}
uint32_t dot(uint32_t sum, uint32_t u, uint32_t s) {
    int64_t wide = sum;
    for (int i = 0; i < 4; ++i)
        wide += int64_t{static_cast<uint8_t>(u >> (8 * i))} * static_cast<int8_t>(s >> (8 * i));
    return static_cast<uint32_t>(wide);
}

// A row: the model, a lane of it in plain C++ (of x, y, z), the AVX2 instruction on halves (of p, q, r, or
// nothing: NO_TWIN), and the instruction (of v, w, u).
#define WORDS const Ints &a, const Ints &b, const Ints &c
#define ROW(NAME, MODEL, T, LANE, TWIN, REAL)                                              \
    struct NAME {                                                                          \
        static constexpr const char* kName = #NAME;                                        \
        ON_AVX2 static Ints model(WORDS) {                                                 \
            const Floats f = bits<Floats>(a), g = bits<Floats>(b);                         \
            (void)c, (void)f, (void)g;                                                     \
            return bits<Ints>(MODEL);                                                      \
        }                                                                                  \
        static Ints plain(WORDS) {                                                         \
            return each<T>(a, b, c, [](T x, T y, T z) -> T {                               \
                (void)x, (void)y, (void)z;                                                 \
                return static_cast<T>(LANE);                                               \
            });                                                                            \
        }                                                                                  \
        ON_AVX2 static bool twin(const Half& a, const Half& b, const Half& c, Half* out) { \
            const auto p = bits<__m256i>(a), q = bits<__m256i>(b), r = bits<__m256i>(c);   \
            const __m256 s = _mm256_castsi256_ps(p), t = _mm256_castsi256_ps(q);           \
            (void)p, (void)q, (void)r, (void)s, (void)t;                                   \
            TWIN;                                                                          \
        }                                                                                  \
        ON_AVX512 static Ints real(WORDS) {                                                \
            const auto v = bits512(a), w = bits512(b), u = bits512(c);                     \
            const __m512 s = _mm512_castsi512_ps(v), t = _mm512_castsi512_ps(w);           \
            (void)v, (void)w, (void)u, (void)s, (void)t;                                   \
            return raw(REAL);                                                              \
        }                                                                                  \
    };
#define HALF(V) return *out = bits<Half>(V), true
#define NO_TWIN return (void)out, false

ON_AVX512 inline __m512i bits512(const Ints& v) {
    return _mm512_loadu_si512(v.bytes);
}
ON_AVX512 inline Ints raw(__m512i v) {
    Ints out;
    _mm512_storeu_si512(out.bytes, v);
    return out;
}
ON_AVX512 inline Ints raw(__m512 v) {
    return raw(_mm512_castps_si512(v));
}

// clang-format off
ROW(row_add_epi8, add_epi8(a, b), uint8_t, x + y, HALF(_mm256_add_epi8(p, q)), _mm512_add_epi8(v, w))
ROW(row_add_epi32, add_epi32(a, b), uint32_t, x + y, HALF(_mm256_add_epi32(p, q)), _mm512_add_epi32(v, w))
ROW(row_sub_epi32, sub_epi32(a, b), uint32_t, x - y, HALF(_mm256_sub_epi32(p, q)), _mm512_sub_epi32(v, w))
ROW(row_mullo_epi32, mullo_epi32(a, b), uint32_t, x * y, HALF(_mm256_mullo_epi32(p, q)), _mm512_mullo_epi32(v, w))
ROW(row_and, and_si512(a, b), uint8_t, x & y, HALF(_mm256_and_si256(p, q)), _mm512_and_si512(v, w))
ROW(row_xor, xor_si512(a, b), uint8_t, x ^ y, HALF(_mm256_xor_si256(p, q)), _mm512_xor_si512(v, w))
ROW(row_xor_ps, xor_ps(f, g), uint8_t, x ^ y, HALF(_mm256_xor_ps(s, t)), _mm512_xor_ps(s, t))
ROW(row_max_epu32, max_epu32(a, b), uint32_t, x > y ? x : y, HALF(_mm256_max_epu32(p, q)), _mm512_max_epu32(v, w))
ROW(row_srli_epi16_0, srli_epi16(a, 0), uint16_t, x, HALF(_mm256_srli_epi16(p, 0)), _mm512_srli_epi16(v, 0))
ROW(row_srli_epi16_4, srli_epi16(a, 4), uint16_t, x / 16, HALF(_mm256_srli_epi16(p, 4)), _mm512_srli_epi16(v, 4))
ROW(row_srli_epi16_16, srli_epi16(a, 16), uint16_t, 0, HALF(_mm256_srli_epi16(p, 16)), _mm512_srli_epi16(v, 16))
ROW(row_slli_epi32_16, slli_epi32(a, 16), uint32_t, x * 65536, HALF(_mm256_slli_epi32(p, 16)),
    _mm512_slli_epi32(v, 16))
ROW(row_slli_epi32_32, slli_epi32(a, 32), uint32_t, 0, HALF(_mm256_slli_epi32(p, 32)), _mm512_slli_epi32(v, 32))
ROW(row_srai_epi32_4, srai_epi32(a, 4), uint32_t, static_cast<int32_t>(x) >> 4, HALF(_mm256_srai_epi32(p, 4)),
    _mm512_srai_epi32(v, 4))
ROW(row_srai_epi32_32, srai_epi32(a, 32), uint32_t, static_cast<int32_t>(x) >> 31, HALF(_mm256_srai_epi32(p, 32)),
    _mm512_srai_epi32(v, 32))
ROW(row_srav_epi32, srav_epi32(a, b), uint32_t, static_cast<int32_t>(x) >> (y > 31 ? 31 : y),
    HALF(_mm256_srav_epi32(p, q)), _mm512_srav_epi32(v, w))
ROW(row_ternary_6A, ternarylogic_epi32(a, b, c, 0x6A), uint8_t, (x & y) ^ z, NO_TWIN,
    _mm512_ternarylogic_epi32(v, w, u, 0x6A))
ROW(row_ternary_E8, ternarylogic_epi32(a, b, c, 0xE8), uint8_t, (x & y) | (z & (x | y)), NO_TWIN,
    _mm512_ternarylogic_epi32(v, w, u, 0xE8))
ROW(row_broadcast_i64x4, xor_si512(broadcast_i64x4(extracti64x4_epi64(a, 1)), inserti64x4(a, extracti64x4_epi64(a, 1), 0)),
    uint8_t, 0, NO_TWIN,
    _mm512_xor_si512(_mm512_broadcast_i64x4(_mm512_extracti64x4_epi64(v, 1)), _mm512_inserti64x4(v, _mm512_extracti64x4_epi64(v, 1), 0)))
ROW(row_srlv_epi16, srlv_epi16(a, b), uint16_t, y > 15 ? 0 : x >> y, NO_TWIN, _mm512_srlv_epi16(v, w))
ROW(row_madd_epi16, madd_epi16(a, b), uint32_t, signed16(x, 0) * signed16(y, 0) + signed16(x, 1) * signed16(y, 1),
    HALF(_mm256_madd_epi16(p, q)), _mm512_madd_epi16(v, w))
ROW(row_dpbusd_epi32, dpbusd_epi32(a, b, c), uint32_t, dot(x, y, z), NO_TWIN, _mm512_dpbusd_epi32(v, w, u))
ROW(row_add_ps, add_ps(f, g), float, x + y, HALF(_mm256_add_ps(s, t)), _mm512_add_ps(s, t))
ROW(row_mul_ps, mul_ps(f, g), float, x * y, HALF(_mm256_mul_ps(s, t)), _mm512_mul_ps(s, t))
ROW(row_min_ps, min_ps(f, g), float, x < y ? x : y, HALF(_mm256_min_ps(s, t)), _mm512_min_ps(s, t))
ROW(row_max_ps, max_ps(f, g), float, x > y ? x : y, HALF(_mm256_max_ps(s, t)), _mm512_max_ps(s, t))
ROW(row_casts, castps_si512(castsi512_ps(a)), uint8_t, x, NO_TWIN, _mm512_castps_si512(_mm512_castsi512_ps(v)))
ROW(row_inserti64x4, inserti64x4(castsi256_si512(extracti64x4_epi64(a, 0)), extracti64x4_epi64(a, 1), 1), uint8_t, x,
    NO_TWIN, _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_extracti64x4_epi64(v, 0)), _mm512_extracti64x4_epi64(v, 1), 1))
// clang-format on

int failures = 0;
bool has_avx512 = false;

// NaNs of sums and products count as one: which of two operands' it is, a compiler may swap.
bool same(const uint8_t* a, const uint8_t* b, size_t bytes, bool nan_is_nan) {
    if (!nan_is_nan) return std::memcmp(a, b, bytes) == 0;
    for (size_t i = 0; i < bytes; i += 4) {
        float x, y;
        std::memcpy(&x, a + i, 4);
        std::memcpy(&y, b + i, 4);
        if (std::memcmp(a + i, b + i, 4) != 0 && !(std::isnan(x) && std::isnan(y))) return false;
    }
    return true;
}

// A register of: small numbers, extremes of each lane, floats of every kind, or random bits.
Ints draw(std::mt19937_64& random) {
    static constexpr uint32_t kEdges[] = {
        0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F800001,
        0xFFBFFFFF, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF,
        0x3F800000, 0xBF800000, 0x80808080, 0x7F7F7F7F, 0xFFFFFFFF, 0x80008000, 0x7FFF7FFF,
        0x7FFFFFFF, 0x0000FFFF, 0x8000FFFF, 0x00FF00FF, 0xFF00FF00, 0x000F0010, 0x0010000F};
    Ints v;
    const auto kind = random() % 4;
    for (int i = 0; i < 16; ++i) {
        uint32_t word = static_cast<uint32_t>(random());
        if (kind == 1) word &= 0x001F001Fu;
        if (kind >= 2 && random() % 4 != 0) word = kEdges[random() % (sizeof kEdges / sizeof kEdges[0])];
        std::memcpy(v.bytes + 4 * i, &word, sizeof word);
    }
    return v;
}

void report(const char* name, const char* wrong, int64_t count) {
    if (wrong == nullptr) {
        std::printf("ok %s: %lld registers\n", name, static_cast<long long>(count));
        return;
    }
    ++failures;
    std::printf("FAILED %s against %s\n", name, wrong);
}

template <typename Row>
void check(bool nan_is_nan = false) {
    std::mt19937_64 random(7);
    const char* wrong = nullptr;
    constexpr int kRounds = 4000;
    for (int round = 0; round < kRounds && wrong == nullptr; ++round) {
        const Ints a = draw(random), c = draw(random);
        const Ints b = round % 16 == 0 ? a : draw(random);
        const Ints found = Row::model(a, b, c), plain = Row::plain(a, b, c);
        if (!same(found.bytes, plain.bytes, 64, nan_is_nan)) wrong = "plain loops";
        for (int half = 0; half < 64; half += 32) {
            Half p, q, r, out;
            std::memcpy(&p, a.bytes + half, sizeof p);
            std::memcpy(&q, b.bytes + half, sizeof q);
            std::memcpy(&r, c.bytes + half, sizeof r);
            if (Row::twin(p, q, r, &out) && !same(found.bytes + half, out.bytes, 32, nan_is_nan))
                wrong = "AVX2";
        }
        if (has_avx512) {
            const Ints real = Row::real(a, b, c);
            if (!same(found.bytes, real.bytes, 64, nan_is_nan)) wrong = "the instruction";
        }
    }
    report(Row::kName + 4, wrong, kRounds);
}

// ---- instructions of another form ------------------------------------------------------------------------

ON_AVX512 Ints real_cvtph(__m256i v) {
    return raw(_mm512_cvtph_ps(v));
}
ON_AVX512 Ints real_cvtepu16(__m256i v) {
    return raw(_mm512_cvtepu16_epi32(v));
}
// Every 16-bit pattern, as a half and as a number.
ON_AVX2 void check_conversions() {
    const char *wrong_half = nullptr, *wrong_word = nullptr;
    for (uint32_t first = 0; first < 65536; first += 16) {
        uint16_t in[16];
        for (uint32_t i = 0; i < 16; ++i) in[i] = static_cast<uint16_t>(first + i);
        const auto v = bits<__m256i>(in);
        const Ints half = bits<Ints>(cvtph_ps(v)), word = cvtepu16_epi32(v);
        for (int i = 0; i < 16; ++i) {
            const float want = half_to_float(in[i]);
            if (!same(half.bytes + 4 * i, reinterpret_cast<const uint8_t*>(&want), 4, true))
                wrong_half = "plain loops";
            const uint32_t wide = in[i];
            if (std::memcmp(word.bytes + 4 * i, &wide, 4) != 0) wrong_word = "plain loops";
        }
        for (int i = 0; i < 2; ++i) {
            __m128i eight;
            std::memcpy(&eight, in + 8 * i, sizeof eight);
            const Half h = bits<Half>(_mm256_cvtph_ps(eight)), w = bits<Half>(_mm256_cvtepu16_epi32(eight));
            if (std::memcmp(half.bytes + 32 * i, h.bytes, 32) != 0) wrong_half = "F16C";
            if (std::memcmp(word.bytes + 32 * i, w.bytes, 32) != 0) wrong_word = "AVX2";
        }
        if (has_avx512) {
            if (std::memcmp(real_cvtph(v).bytes, half.bytes, 64) != 0) wrong_half = "the instruction";
            if (std::memcmp(real_cvtepu16(v).bytes, word.bytes, 64) != 0) wrong_word = "the instruction";
        }
    }
    report("cvtph_ps", wrong_half, 4096);
    report("cvtepu16_epi32", wrong_word, 4096);
}

ON_AVX512 __m256i real_dot(__m256i a, __m256i b, __m256i c) {
    return _mm256_dpbusd_epi32(a, b, c);
}
ON_AVX2 void check_dot_256() {
    std::mt19937_64 random(8);
    const char* wrong = nullptr;
    for (int round = 0; round < 4000; ++round) {
        const Ints a = draw(random), b = draw(random), c = draw(random);
        const Ints plain = each<uint32_t>(a, b, c, dot);
        __m256i x, y, z;
        std::memcpy(&x, a.bytes, sizeof x);
        std::memcpy(&y, b.bytes, sizeof y);
        std::memcpy(&z, c.bytes, sizeof z);
        const Half found = bits<Half>(dpbusd_epi32_256(x, y, z));
        if (std::memcmp(found.bytes, plain.bytes, 32) != 0) wrong = "plain loops";
        if (has_avx512 && std::memcmp(bits<Half>(real_dot(x, y, z)).bytes, found.bytes, 32) != 0)
            wrong = "the instruction";
    }
    report("dpbusd_epi32 of 256 bits", wrong, 4000);
}

ON_AVX512 void real_masked(uint16_t mask, const void* p, const void* q, const Ints& v, Ints* ps, Half* words,
                           uint8_t* stored) {
    *ps = raw(_mm512_maskz_loadu_ps(mask, p));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words->bytes), _mm256_maskz_loadu_epi16(mask, q));
    _mm512_mask_cvtepi32_storeu_epi8(stored, mask, bits512(v));
}
// Memory ends with the last lane of the mask: AddressSanitizer sees a byte more.
ON_AVX2 void check_masks() {
    std::mt19937_64 random(9);
    const char* wrong = nullptr;
    for (uint32_t round = 0; round < 4000; ++round) {
        const uint32_t lanes = round % 17, prefix = (1u << lanes) - 1u;
        const auto mask = static_cast<__mmask16>(round % 3 == 0 ? prefix & random() : prefix);
        const Ints v = draw(random);
        const std::vector<uint8_t> floats(v.bytes, v.bytes + 4 * lanes), words(v.bytes, v.bytes + 2 * lanes);
        std::vector<uint8_t> stored(lanes, 0xA5);
        Ints ps = bits<Ints>(maskz_loadu_ps(mask, floats.data()));
        Half half = bits<Half>(maskz_loadu_epi16_256(mask, words.data()));
        mask_cvtepi32_storeu_epi8(stored.data(), mask, v);
        for (int with = 0; with <= static_cast<int>(has_avx512); ++with) {
            for (uint32_t i = 0; i < 16; ++i) {
                const bool on = ((mask >> i) & 1u) != 0;
                for (uint32_t byte = 0; byte < 4; ++byte)
                    if (ps.bytes[4 * i + byte] != (on ? v.bytes[4 * i + byte] : 0)) wrong = "plain loops";
                for (uint32_t byte = 0; byte < 2; ++byte)
                    if (half.bytes[2 * i + byte] != (on ? v.bytes[2 * i + byte] : 0)) wrong = "plain loops";
                if (i < lanes && stored[i] != (on ? v.bytes[4 * i] : 0xA5)) wrong = "plain loops";
            }
            if (with == 0 && has_avx512) {
                stored.assign(lanes, 0xA5);
                real_masked(mask, floats.data(), words.data(), v, &ps, &half, stored.data());
            }
        }
    }
    report("masks", wrong, 4000);
}

// The sum is that of lanes without their low bits: gcc adds signed words in its own header, and where the sum
// of all wraps UBSan stops there.
ON_AVX512 void real_reduced(const Ints& v, int* sum, unsigned* max) {
    *sum = _mm512_reduce_add_epi32(_mm512_srai_epi32(bits512(v), 5));
    *max = _mm512_reduce_max_epu32(bits512(v));
}
ON_AVX2 void check_reductions_and_parts() {
    std::mt19937_64 random(10);
    const char* wrong = nullptr;
    for (int round = 0; round < 4000; ++round) {
        const Ints v = draw(random);
        int64_t sum = 0;
        unsigned max = 0;
        for (int i = 0; i < 16; ++i) {
            uint32_t lane;
            std::memcpy(&lane, v.bytes + 4 * i, sizeof lane);
            sum += lane;
            max = lane > max ? lane : max;
        }
        if (reduce_add_epi32(v) != static_cast<int>(static_cast<uint32_t>(sum))) wrong = "plain loops";
        if (reduce_max_epu32(v) != max) wrong = "plain loops";
        if (has_avx512) {
            int real_sum;
            unsigned real_max;
            real_reduced(v, &real_sum, &real_max);
            if (real_sum != reduce_add_epi32(srai_epi32(v, 5)) || real_max != max) wrong = "the instruction";
        }
        for (int half = 0; half < 2; ++half) {
            const Half part = bits<Half>(extracti64x4_epi64(v, half));
            if (std::memcmp(part.bytes, v.bytes + 32 * half, 32) != 0) wrong = "plain loops";
            const Ints put = inserti64x4(Ints{}, extracti64x4_epi64(v, half), half);
            if (std::memcmp(put.bytes + 32 * half, v.bytes + 32 * half, 32) != 0) wrong = "plain loops";
            for (int i = 0; i < 32; ++i)
                if (put.bytes[32 * (1 - half) + i] != 0) wrong = "plain loops";
        }
        const Half low = bits<Half>(castsi512_si256(v));
        if (std::memcmp(low.bytes, v.bytes, 32) != 0) wrong = "plain loops";
        uint8_t stored[65] = {};
        storeu_si512(stored + 1, v);
        if (std::memcmp(stored + 1, v.bytes, 64) != 0 || stored[0] != 0) wrong = "plain loops";
        const Ints loaded = loadu_si512(stored + 1);
        if (std::memcmp(loaded.bytes, v.bytes, 64) != 0) wrong = "plain loops";
        float value;
        int32_t word;
        std::memcpy(&value, v.bytes, sizeof value);
        std::memcpy(&word, v.bytes, sizeof word);
        const Ints splat_ps = bits<Ints>(set1_ps(value)), splat_32 = set1_epi32(word);
        for (int i = 0; i < 16; ++i) {
            if (std::memcmp(splat_ps.bytes + 4 * i, &value, 4) != 0) wrong = "plain loops";
            if (std::memcmp(splat_32.bytes + 4 * i, &word, 4) != 0) wrong = "plain loops";
        }
        for (const uint8_t byte : set1_epi8(static_cast<char>(v.bytes[0])).bytes)
            if (byte != v.bytes[0]) wrong = "plain loops";
    }
    const Ints nothing = setzero_si512();
    for (const uint8_t byte : nothing.bytes)
        if (byte != 0) wrong = "plain loops";
    report("reductions, parts, loads and splats", wrong, 4000);
}

bool avx512_here() {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || ((ecx >> 27) & 1u) == 0) return false;
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0xE6u) != 0xE6u || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr uint32_t kFoundation = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
    return (ebx & kFoundation) == kFoundation && ((ecx >> 11) & 1u) != 0;
}

void run() {
    has_avx512 = avx512_here();
    check<row_add_epi8>();
    check<row_add_epi32>();
    check<row_sub_epi32>();
    check<row_mullo_epi32>();
    check<row_and>();
    check<row_xor>();
    check<row_xor_ps>();
    check<row_max_epu32>();
    check<row_srli_epi16_0>();
    check<row_srli_epi16_4>();
    check<row_srli_epi16_16>();
    check<row_slli_epi32_16>();
    check<row_slli_epi32_32>();
    check<row_srlv_epi16>();
    check<row_srai_epi32_4>();
    check<row_srai_epi32_32>();
    check<row_srav_epi32>();
    check<row_ternary_6A>();
    check<row_ternary_E8>();
    check<row_broadcast_i64x4>();
    check<row_madd_epi16>();
    check<row_dpbusd_epi32>();
    check<row_add_ps>(true);
    check<row_mul_ps>(true);
    check<row_min_ps>();
    check<row_max_ps>();
    check<row_casts>();
    check<row_inserti64x4>();
    check_conversions();
    check_dot_256();
    check_masks();
    check_reductions_and_parts();
    std::printf("the processor %s AVX-512 with VNNI\n%d failures\n", has_avx512 ? "has" : "lacks", failures);
}

}  // namespace
}  // namespace dqk::avx512_model

int main() {
    dqk::avx512_model::run();
    return dqk::avx512_model::failures == 0 ? 0 : 1;
}
