// The loops of attention.h on vectors of 32 bytes. Included once per instruction set, with
//   DQK_NAMESPACE  a namespace of its own,
//   DQK_TARGET     the attribute that lets the compiler use it,
//   DQK_DOT4       dot4(sums, u, s): int32 sums + the products of 4 unsigned and 4 signed bytes per lane.
// Every sum is exact: |q|, c <= 127 and |k|, |v| <= 128, so the products of a pair of bytes stay below 2^15.

namespace dqk {
namespace DQK_NAMESPACE {
namespace {

DQK_DOT4

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

DQK_TARGET void dots_rows(const int8_t* q, const KeyRows& keys, int64_t first, int64_t count,
                          int64_t head_dim, int32_t* out) {
    const int64_t whole = head_dim / 32 * 32;
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
            for (int i = 0; i < 8; ++i) {
                const __m256i key = load32(rows[i] + d);
                sums[i] = dot4(sums[i], _mm256_abs_epi8(key), _mm256_sign_epi8(query, key));
            }
        }
        if (whole < head_dim) {
            const __m256i query = load32(q + whole);
            for (int i = 0; i < 8; ++i) {
                const __m256i key = load_rest(rows[i] + whole, head_dim - whole, keys.end);
                sums[i] = dot4(sums[i], _mm256_abs_epi8(key), _mm256_sign_epi8(query, key));
            }
        }
        store(out + j, sum_each(sums));
    }
}

// kTiles tiles at a time, so that each broadcast of a query serves them all.
template <int kQueries, int kTiles>
DQK_TARGET const int8_t* dots_tiles(const int8_t* q, int64_t q_stride, const int8_t* packed, int64_t tiles,
                                    int64_t quads, int32_t* out, int64_t out_stride) {
    for (; tiles >= kTiles; tiles -= kTiles, packed += kTiles * quads * 32, out += kTiles * kTileKeys) {
        __m256i sums[kTiles][kQueries];
        for (int t = 0; t < kTiles; ++t)
            for (int i = 0; i < kQueries; ++i) sums[t][i] = _mm256_setzero_si256();
        for (int64_t quad = 0; quad < quads; ++quad) {
            __m256i keys[kTiles], sizes[kTiles];
            for (int t = 0; t < kTiles; ++t) {
                keys[t] = load32(packed + (t * quads + quad) * 32);
                sizes[t] = _mm256_abs_epi8(keys[t]);
            }
            for (int i = 0; i < kQueries; ++i) {
                int32_t four;
                std::memcpy(&four, q + i * q_stride + quad * 4, 4);
                const __m256i query = _mm256_set1_epi32(four);
                for (int t = 0; t < kTiles; ++t)
                    sums[t][i] = dot4(sums[t][i], sizes[t], _mm256_sign_epi8(query, keys[t]));
            }
        }
        for (int t = 0; t < kTiles; ++t)
            for (int i = 0; i < kQueries; ++i) store(out + i * out_stride + t * kTileKeys, sums[t][i]);
    }
    return packed;
}

template <int kQueries>
DQK_TARGET void dots_queries(const int8_t* q, int64_t q_stride, const int8_t* packed, int64_t tiles,
                             int64_t quads, int32_t* out, int64_t out_stride) {
    packed = dots_tiles<kQueries, 2>(q, q_stride, packed, tiles, quads, out, out_stride);
    if (tiles % 2 != 0)
        dots_tiles<kQueries, 1>(q, q_stride, packed, 1, quads, out + (tiles - 1) * kTileKeys, out_stride);
}

DQK_TARGET void dots_packed(const int8_t* q, int64_t q_stride, int64_t queries, const int8_t* packed,
                            int64_t tiles, int64_t head_dim, int32_t* out, int64_t out_stride) {
    const int64_t quads = round_up(head_dim, 4) / 4;
    switch (queries) {
        case 1:
            return dots_queries<1>(q, q_stride, packed, tiles, quads, out, out_stride);
        case 2:
            return dots_queries<2>(q, q_stride, packed, tiles, quads, out, out_stride);
        case 3:
            return dots_queries<3>(q, q_stride, packed, tiles, quads, out, out_stride);
        default:
            return dots_queries<4>(q, q_stride, packed, tiles, quads, out, out_stride);
    }
}

DQK_TARGET void pack_keys(const int8_t* rows, int64_t stride, int64_t head_dim, int8_t* out) {
    const int64_t quads = round_up(head_dim, 4) / 4;
    for (int64_t first = 0; first < quads; first += 8) {  // a transposition of 8 x 8 words
        __m256i a[8], b[8];
        for (int i = 0; i < 8; ++i) a[i] = load32(rows + i * stride + first * 4);
        for (int i = 0; i < 8; i += 2) {
            b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            b[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
            b[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
        }
        for (int64_t i = 0; i < 8 && first + i < quads; ++i, out += 32)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), b[i]);
    }
}

// 4 rows of 32 bytes -> 4 bytes of each of 32 elements; lanes of 128 bits stay apart, so quad[i] holds
// elements 4 i to 4 i + 3 and 16 + 4 i to 16 + 4 i + 3.
DQK_TARGET inline void interleave(__m256i a, __m256i b, __m256i c, __m256i d, __m256i* quad) {
    const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
    quad[0] = _mm256_unpacklo_epi16(ab_low, cd_low);
    quad[1] = _mm256_unpackhi_epi16(ab_low, cd_low);
    quad[2] = _mm256_unpacklo_epi16(ab_high, cd_high);
    quad[3] = _mm256_unpackhi_epi16(ab_high, cd_high);
}

// Into the order of the elements.
DQK_TARGET inline void straighten(const __m256i* quad, __m256i* out) {
    out[0] = _mm256_permute2x128_si256(quad[0], quad[1], 0x20);
    out[1] = _mm256_permute2x128_si256(quad[2], quad[3], 0x20);
    out[2] = _mm256_permute2x128_si256(quad[0], quad[1], 0x31);
    out[3] = _mm256_permute2x128_si256(quad[2], quad[3], 0x31);
}

DQK_TARGET void pack_values(const int8_t* rows, int64_t stride, int64_t head_dim, int8_t* out) {
    for (int64_t d = 0; d < head_dim; d += 32) {
        __m256i quad[4], straight[4];
        interleave(load32(rows + d), load32(rows + stride + d), load32(rows + 2 * stride + d),
                   load32(rows + 3 * stride + d), quad);
        straighten(quad, straight);
        for (int64_t i = 0; i < 4 && d + i * 8 < head_dim; ++i, out += 32)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), straight[i]);
    }
}

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

// share_of of share.h, the same steps in the same order.
DQK_TARGET inline __m256 share_of8(__m256 x) {
    const __m256 magic = _mm256_set1_ps(kMagic);
    const __m256 t = _mm256_mul_ps(x, _mm256_set1_ps(kLog2E)), shifted = _mm256_add_ps(t, magic);
    const __m256 f = _mm256_sub_ps(t, _mm256_sub_ps(shifted, magic));
    __m256 p = _mm256_set1_ps(kShareTerm[0]);
    for (int i = 1; i < kShareTerms; ++i)
        p = _mm256_add_ps(_mm256_mul_ps(p, f), _mm256_set1_ps(kShareTerm[i]));
    p = _mm256_add_ps(_mm256_mul_ps(p, f), _mm256_set1_ps(kQuantMax));
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}

DQK_TARGET inline __m256i rounded(__m256 x) {
    return _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(x, _mm256_set1_ps(kMagic))),
                            _mm256_set1_epi32(static_cast<int32_t>(kMagicBits)));
}

DQK_TARGET inline __m256i share8(const int32_t* work, __m256 shift, __m256 v_scale, __m256 v_inv,
                                 uint8_t* c) {
    const __m256 s = _mm256_loadu_ps(reinterpret_cast<const float*>(work));
    const __m256 x = _mm256_max_ps(_mm256_sub_ps(s, shift), _mm256_set1_ps(kShareLow));
    const __m256 t = share_of8(x);
    // 1, the second, where the scale of a hidden key is NaN.
    const __m256 ratio = _mm256_min_ps(_mm256_mul_ps(v_scale, v_inv), _mm256_set1_ps(1.0f));
    const __m256i codes = rounded(_mm256_mul_ps(t, ratio));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(c), _mm_packus_epi16(words, words));
    return rounded(t);
}

DQK_TARGET int32_t shares(const int32_t* work, int64_t count, float shift, const float* v_scale, float v_inv,
                          uint8_t* c) {
    const __m256 shift8 = _mm256_set1_ps(shift), inv8 = _mm256_set1_ps(v_inv);
    __m256i weight = _mm256_setzero_si256();
    int64_t j = 0;
    for (; j + 8 <= count; j += 8)
        weight =
            _mm256_add_epi32(weight, share8(work + j, shift8, _mm256_loadu_ps(v_scale + j), inv8, c + j));
    if (j < count) {
        const __m256 scale = _mm256_maskload_ps(v_scale + j, first_lanes(count - j));
        weight = _mm256_add_epi32(weight, share8(work + j, shift8, scale, inv8, c + j));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), weight);
    int32_t sum = 0;
    for (const int32_t lane : lanes) sum += lane;
    return sum;
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

// kVectors * 8 elements from `packed` on, whose quads are `stride` bytes apart.
template <int kVectors>
DQK_TARGET void sum_quads(const uint8_t* c, const int32_t* list, int64_t found, const int8_t* packed,
                          int64_t stride, int32_t* total) {
    __m256i sums[kVectors];
    for (int i = 0; i < kVectors; ++i) sums[i] = _mm256_setzero_si256();
    for (int64_t n = 0; n < found; ++n) {
        int32_t four;
        std::memcpy(&four, c + static_cast<int64_t>(list[n]) * kQuadKeys, 4);
        const __m256i share = _mm256_set1_epi32(four);
        const int8_t* quad = packed + list[n] * stride;
        for (int i = 0; i < kVectors; ++i) sums[i] = dot4(sums[i], share, load32(quad + i * 32));
    }
    for (int i = 0; i < kVectors; ++i) store(total + i * 8, sums[i]);
}

DQK_TARGET void sum_packed(uint8_t* c, int64_t count, const int8_t* packed, int64_t head_dim, int32_t* list,
                           int32_t* total) {
    int64_t found = 0;
    for (int64_t quad = 0; quad * kQuadKeys < count; ++quad) {
        uint32_t four;
        std::memcpy(&four, c + quad * kQuadKeys, 4);
        list[found] = static_cast<int32_t>(quad);
        found += four != 0;
    }
    const int64_t vectors = round_up(head_dim, 8) / 8, stride = vectors * 32;
    int64_t i = 0;
    for (; i + 8 <= vectors; i += 8) sum_quads<8>(c, list, found, packed + i * 32, stride, total + i * 8);
    for (; i + 4 <= vectors; i += 4) sum_quads<4>(c, list, found, packed + i * 32, stride, total + i * 8);
    for (; i < vectors; ++i) sum_quads<1>(c, list, found, packed + i * 32, stride, total + i * 8);
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
