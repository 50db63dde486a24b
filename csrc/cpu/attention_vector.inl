// The loops of attention.h on vectors of 32 bytes. Included once per instruction set, with
//   DQK_NAMESPACE  a namespace of its own,
//   DQK_TARGET     the attribute that lets the compiler use it,
//   DQK_DOT4       dot4(sums, u, s): int32 sums + the products of 4 unsigned and 4 signed bytes per lane,
//   DQK_VNNI       whether that holds any bytes (1), or only where a pair of products fits in 16 bits (0),
//   DQK_REGISTERS  how many vectors the set has room for.
// Every sum is exact: |q|, c <= 127 and |k|, |v| <= 128, so the products of a pair of bytes stay below 2^15.

namespace dqk {
namespace DQK_NAMESPACE {
namespace {

DQK_DOT4

constexpr bool kVnni = DQK_VNNI;
constexpr int kKeyTiles = DQK_REGISTERS == 32 ? 4 : 2;    // that meet four queries at a time
constexpr int kSumQueries = DQK_REGISTERS == 32 ? 4 : 2;  // that share one pass over packed values

DQK_TARGET inline __m256i load32(const int8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// The last `left` (< 32) elements of a row. What follows is harmless wherever it may be read: it meets a zero
// of q, or ends in elements past head_dim.
DQK_TARGET inline __m256i load_rest(const int8_t* p, int64_t left, const int8_t* end) {
    if (end - p >= 32) return load32(p);
    alignas(32) int8_t copy[32] = {};
    std::memcpy(copy, p, static_cast<size_t>(left));
    return load32(copy);
}

// All ones in the first `count` (< 8) of 8 lanes.
DQK_TARGET inline __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// The sums of each of 8 vectors, in order.
DQK_TARGET inline __m256i sum_each(const __m256i* v) {
    const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                            _mm256_permute2x128_si256(low, high, 0x31));
}

DQK_TARGET inline void store(int32_t* p, __m256i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}

// The unsigned byte of a dot product has to be the key's. With VNNI that is the key plus 128, and 128 times
// the sum of the query comes off; else the key's size, and the query takes its sign.
DQK_TARGET inline __m256i offset_key(__m256i key) {
    return _mm256_xor_si256(key, _mm256_set1_epi8(static_cast<char>(0x80)));
}
DQK_TARGET inline __m256i multiply_key(__m256i sums, __m256i query, __m256i key) {
    if constexpr (kVnni) {
        return dot4(sums, offset_key(key), query);
    } else {
        return dot4(sums, _mm256_abs_epi8(key), _mm256_sign_epi8(query, key));
    }
}

// Minus what the offset of keys adds to each sum of a query, which is padded with zeros to a multiple of 32.
DQK_TARGET inline __m256i start_of(const int8_t* q, int64_t head_dim) {
    if constexpr (!kVnni) return _mm256_setzero_si256();
    __m256i sums = _mm256_setzero_si256();
    for (int64_t d = 0; d < head_dim; d += 32)
        sums = dot4(sums, offset_key(_mm256_setzero_si256()), load32(q + d));
    sums = _mm256_add_epi32(sums, _mm256_permute2x128_si256(sums, sums, 1));
    sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0x4E));
    sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0xB1));
    return _mm256_sub_epi32(_mm256_setzero_si256(), sums);
}

DQK_TARGET void dots_rows(const int8_t* q, const KeyRows& keys, int64_t first, int64_t count,
                          int64_t head_dim, int32_t* out) {
    const int64_t whole = head_dim / 32 * 32;
    const __m256i start = start_of(q, head_dim);
    for (int64_t j = 0; j < count; j += 8) {
        const int8_t* rows[8];
        if (keys.offset == nullptr && j + 8 <= count) {
            rows[0] = keys.base + (first + j) * keys.stride;
            for (int i = 1; i < 8; ++i) rows[i] = rows[i - 1] + keys.stride;
        } else {
            for (int64_t i = 0; i < 8; ++i) rows[i] = keys.row(first + (j + i < count ? j + i : count - 1));
        }
        for (int64_t i = j + kKeysAhead; i < j + kKeysAhead + 8 && i < count; ++i)
            ask_for(keys.row(first + i), head_dim);
        __m256i sums[8];
        for (int i = 0; i < 8; ++i) sums[i] = _mm256_setzero_si256();
        for (int64_t d = 0; d < whole; d += 32) {
            const __m256i query = load32(q + d);
            for (int i = 0; i < 8; ++i) sums[i] = multiply_key(sums[i], query, load32(rows[i] + d));
        }
        if (whole < head_dim) {
            const __m256i query = load32(q + whole);
            for (int i = 0; i < 8; ++i)
                sums[i] =
                    multiply_key(sums[i], query, load_rest(rows[i] + whole, head_dim - whole, keys.end));
        }
        store(out + j, _mm256_add_epi32(sum_each(sums), start));
    }
}

#include "cpu/attention_packed.inl"

struct Running {
    __m256 top;
    __m256i v_max;
    __m256 nan;
};

// 8 scores. Lanes outside `seen` are hidden, whatever they hold.
DQK_TARGET inline __m256 score8(__m256i dots, __m256 q_scale, __m256 k_scale, __m256 v_scale,
                                const __m256* bias, __m256 seen, Running* running) {
    __m256 s = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(dots), q_scale), k_scale);
    if (bias != nullptr) s = _mm256_add_ps(s, *bias);
    s = _mm256_blendv_ps(_mm256_set1_ps(-bits_float(kInfBits)), s, seen);
    const __m256 size =
        _mm256_and_ps(_mm256_and_ps(v_scale, seen), _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF)));
    running->nan = _mm256_or_ps(running->nan, _mm256_cmp_ps(s, s, _CMP_UNORD_Q));
    running->top = _mm256_max_ps(s, running->top);  // the second where the first is NaN
    running->v_max = _mm256_max_epu32(running->v_max, _mm256_castps_si256(size));
    return s;
}

DQK_TARGET inline __m256 seen8(const uint8_t* mask) {
    int64_t eight;
    std::memcpy(&eight, mask, 8);
    return _mm256_castsi256_ps(
        _mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight)), _mm256_setzero_si256()));
}

DQK_TARGET Extremes scores(int32_t* work, int64_t count, float q_scale, const float* k_scale,
                           const float* v_scale, const float* bias, const uint8_t* mask) {
    const __m256 scale = _mm256_set1_ps(q_scale), all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    Running running = {_mm256_set1_ps(-bits_float(kInfBits)), _mm256_setzero_si256(), _mm256_setzero_ps()};
    auto* out = reinterpret_cast<float*>(work);
    int64_t j = 0;
    for (; j + 8 <= count; j += 8) {
        const __m256i dots = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(work + j));
        __m256 added = _mm256_setzero_ps();
        if (bias != nullptr) added = _mm256_loadu_ps(bias + j);
        _mm256_storeu_ps(out + j, score8(dots, scale, _mm256_loadu_ps(k_scale + j),
                                         _mm256_loadu_ps(v_scale + j), bias == nullptr ? nullptr : &added,
                                         mask == nullptr ? all : seen8(mask + j), &running));
    }
    if (j < count) {
        const __m256i lanes = first_lanes(count - j);
        const __m256i dots = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(work + j));
        __m256 added = _mm256_setzero_ps(), seen = _mm256_castsi256_ps(lanes);
        if (bias != nullptr) added = _mm256_maskload_ps(bias + j, lanes);
        if (mask != nullptr) {
            uint8_t rest[8] = {};
            std::memcpy(rest, mask + j, static_cast<size_t>(count - j));
            seen = _mm256_and_ps(seen, seen8(rest));
        }
        _mm256_storeu_ps(out + j, score8(dots, scale, _mm256_maskload_ps(k_scale + j, lanes),
                                         _mm256_maskload_ps(v_scale + j, lanes),
                                         bias == nullptr ? nullptr : &added, seen, &running));
    }
    alignas(32) float top[8];
    alignas(32) uint32_t v_max[8];
    _mm256_store_ps(top, running.top);
    _mm256_store_si256(reinterpret_cast<__m256i*>(v_max), running.v_max);
    Extremes found = {top[0], v_max[0], _mm256_movemask_ps(running.nan) != 0};
    for (int i = 1; i < 8; ++i) {
        found.top = top[i] > found.top ? top[i] : found.top;
        found.v_max_bits = v_max[i] > found.v_max_bits ? v_max[i] : found.v_max_bits;
    }
    return found;
}

DQK_TARGET int32_t shares(const int32_t* work, int64_t count, float shift, const float* v_scale, float v_inv,
                          uint8_t* c) {
    return shares_of(work, count, shift, v_scale, v_inv, c);
}

// total[0..31] += 32 sums of 16 bits, as two interleaved halves of 128 bits leave them.
DQK_TARGET inline void add_words(__m256i low, __m256i high, int32_t* total) {
    const __m128i parts[4] = {_mm256_castsi256_si128(low), _mm256_castsi256_si128(high),
                              _mm256_extracti128_si256(low, 1), _mm256_extracti128_si256(high, 1)};
    for (int i = 0; i < 4; ++i) {
        auto* at = reinterpret_cast<__m256i*>(total + i * 8);
        _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), _mm256_cvtepi16_epi32(parts[i])));
    }
}

// kVectors * 32 elements from `first` on. The products of a pair of keys are added while they have 16 bits,
// and those of further pairs too, as long as the shares add up to 255: 255 * 128 < 2^15.
template <int kVectors, bool kWhole>
DQK_TARGET void sum_pairs(const uint8_t* c, const int32_t* list, int64_t found, const KeyRows& values,
                          int64_t first, int64_t left, int32_t* total) {
    __m256i low[kVectors], high[kVectors];
    for (int i = 0; i < kVectors; ++i) low[i] = high[i] = _mm256_setzero_si256();
    int32_t room = 255;
    for (int64_t n = 0; n < found; n += 2) {
        const int32_t here = c[n] + c[n + 1];
        if (here > room) {
            for (int i = 0; i < kVectors; ++i) {
                add_words(low[i], high[i], total + i * 32);
                low[i] = high[i] = _mm256_setzero_si256();
            }
            room = 255;
        }
        room -= here;
        for (int64_t i = n + kKeysAhead; i < n + kKeysAhead + 2 && i < found; ++i)
            ask_for(values.row(list[i]) + first, kVectors * 32);
        uint16_t two;
        std::memcpy(&two, c + n, 2);
        const __m256i share = _mm256_set1_epi16(static_cast<int16_t>(two));
        const int8_t *a = values.row(list[n]) + first, *b = values.row(list[n + 1]) + first;
        for (int i = 0; i < kVectors; ++i) {
            const __m256i va = kWhole ? load32(a + i * 32) : load_rest(a, left, values.end);
            const __m256i vb = kWhole ? load32(b + i * 32) : load_rest(b, left, values.end);
            low[i] = _mm256_add_epi16(low[i], _mm256_maddubs_epi16(share, _mm256_unpacklo_epi8(va, vb)));
            high[i] = _mm256_add_epi16(high[i], _mm256_maddubs_epi16(share, _mm256_unpackhi_epi8(va, vb)));
        }
    }
    for (int i = 0; i < kVectors; ++i) add_words(low[i], high[i], total + i * 32);
}

// Brings the shares that are not 0 to the front of c, and their keys into the list; returns how many. Most
// keys of a long text have no share of a query: only the others are looked up.
DQK_TARGET inline int64_t keep_shares(uint8_t* c, int64_t count, int32_t* list) {
    int64_t found = 0;
    for (int64_t j = 0; j < count; j += 8) {
        const __m128i shares = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(c + j));
        const int zeros = _mm_movemask_epi8(_mm_cmpeq_epi8(shares, _mm_setzero_si128())) & 0xFF;
        const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kKept.lanes[zeros]));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(c + found), _mm_shuffle_epi8(shares, lanes));
        store(list + found,
              _mm256_add_epi32(_mm256_cvtepu8_epi32(lanes), _mm256_set1_epi32(static_cast<int32_t>(j))));
        found += kKept.count[zeros];
    }
    return found;
}

DQK_TARGET void sum_rows(uint8_t* c, int64_t count, const KeyRows& values, int64_t head_dim, int32_t* list,
                         int32_t* total) {
    const int64_t found = keep_shares(c, count, list);
    c[found] = 0;
    list[found] = list[0];  // the mate of the last of an odd number
    std::memset(total, 0, static_cast<size_t>(round_up(head_dim, 32)) * sizeof(int32_t));
    int64_t d = 0;
    for (; d + 64 <= head_dim; d += 64) sum_pairs<2, true>(c, list, found, values, d, 64, total + d);
    for (; d + 32 <= head_dim; d += 32) sum_pairs<1, true>(c, list, found, values, d, 32, total + d);
    if (d < head_dim) sum_pairs<1, false>(c, list, found, values, d, head_dim - d, total + d);
}

DQK_TARGET void divide(const int32_t* total, int64_t head_dim, float v_max, float weight, float* out) {
    const __m256 factor = _mm256_set1_ps(v_max), divisor = _mm256_set1_ps(weight);
    for (int64_t d = 0; d < head_dim; d += 8) {
        const __m256 sum =
            _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(total + d)));
        _mm256_storeu_ps(out + d, _mm256_div_ps(_mm256_mul_ps(sum, factor), divisor));
    }
}

constexpr AttentionFunctions kFunctions = {dots_rows, dots_packed, pack_keys,  pack_values, scores,
                                           shares,    sum_rows,    sum_packed, divide};

}  // namespace
}  // namespace DQK_NAMESPACE
}  // namespace dqk

#undef DQK_NAMESPACE
#undef DQK_TARGET
#undef DQK_DOT4
#undef DQK_VNNI
#undef DQK_REGISTERS
