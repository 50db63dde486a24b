// Keys and values of several queries, in the packed form of attention.h: how they get into it, and their
// products. Part of attention_vector.inl, in the middle of its namespace.

// Sums in registers. Places are spelled out when compiled, by folding over them: an array that loops go
// through stays in memory with GCC, or is copied in every step unless it is told (`pin`) not to.
template <int kPlaces>
struct Sums {
    __m256i at[kPlaces];
};
DQK_TARGET inline void pin(__m256i& sum) {
    __asm__ volatile("" : "+v"(sum));
}
template <int kPlaces, int... kAt>
DQK_TARGET inline void pin_sums(Sums<kPlaces>& sums, std::integer_sequence<int, kAt...>) {
    (pin(sums.at[kAt]), ...);
}

DQK_TARGET inline __m256i broadcast4(const void* bytes) {
    int32_t four;
    std::memcpy(&four, bytes, 4);
    return _mm256_set1_epi32(four);
}

// One quad of elements of kTiles tiles; the sum of query i and tile t has place i * kTiles + t.
template <int kTiles, int kPlaces, int... kAt>
DQK_TARGET inline void dots_step(const int8_t* q, int64_t q_stride, const int8_t* packed, int64_t quads,
                                 Sums<kPlaces>& sums, std::integer_sequence<int, kAt...>) {
    __m256i keys[kTiles];
    for (int t = 0; t < kTiles; ++t) keys[t] = load32(packed + t * quads * 32);
    if constexpr (kVnni) {  // packed with their offset
        ((sums.at[kAt] = dot4(sums.at[kAt], keys[kAt % kTiles], broadcast4(q + kAt / kTiles * q_stride))),
         ...);
    } else {
        ((sums.at[kAt] =
              multiply_key(sums.at[kAt], broadcast4(q + kAt / kTiles * q_stride), keys[kAt % kTiles])),
         ...);
    }
}

template <int kTiles, int kPlaces, int... kAt>
DQK_TARGET inline void dots_start(const __m256i* start, Sums<kPlaces>& sums,
                                  std::integer_sequence<int, kAt...>) {
    ((sums.at[kAt] = start[kAt / kTiles]), ...);
}
template <int kTiles, int kPlaces, int... kAt>
DQK_TARGET inline void dots_store(const Sums<kPlaces>& sums, int32_t* out, int64_t out_stride,
                                  std::integer_sequence<int, kAt...>) {
    (store(out + kAt / kTiles * out_stride + kAt % kTiles * kTileKeys, sums.at[kAt]), ...);
}

// kTiles tiles at a time, so that each broadcast of a query serves them all.
template <int kQueries, int kTiles>
DQK_TARGET inline const int8_t* dots_tiles(const int8_t* q, int64_t q_stride, const int8_t* packed,
                                           int64_t tiles, int64_t quads, const __m256i* start, int32_t* out,
                                           int64_t out_stride) {
    constexpr std::make_integer_sequence<int, kQueries * kTiles> kPlaces;
    for (; tiles >= kTiles; tiles -= kTiles, packed += kTiles * quads * 32, out += kTiles * kTileKeys) {
        Sums<kQueries * kTiles> sums;
        dots_start<kTiles>(start, sums, kPlaces);
        pin_sums(sums, kPlaces);
        for (int64_t quad = 0; quad < quads; ++quad) {
            dots_step<kTiles>(q + quad * 4, q_stride, packed + quad * 32, quads, sums, kPlaces);
            pin_sums(sums, kPlaces);
        }
        dots_store<kTiles>(sums, out, out_stride, kPlaces);
    }
    return packed;
}

template <int kQueries>
DQK_TARGET void dots_queries(const int8_t* q, int64_t q_stride, const int8_t* packed, int64_t tiles,
                             int64_t head_dim, int32_t* out, int64_t out_stride) {
    const int64_t quads = round_up(head_dim, 4) / 4, rest = tiles % kKeyTiles;
    __m256i start[kQueries];
    for (int i = 0; i < kQueries; ++i) start[i] = start_of(q + i * q_stride, head_dim);
    packed = dots_tiles<kQueries, kKeyTiles>(q, q_stride, packed, tiles, quads, start, out, out_stride);
    dots_tiles<kQueries, 1>(q, q_stride, packed, rest, quads, start, out + (tiles - rest) * kTileKeys,
                            out_stride);
}

DQK_TARGET void dots_packed(const int8_t* q, int64_t q_stride, int64_t queries, const int8_t* packed,
                            int64_t tiles, int64_t head_dim, int32_t* out, int64_t out_stride) {
    switch (queries) {
        case 1:
            return dots_queries<1>(q, q_stride, packed, tiles, head_dim, out, out_stride);
        case 2:
            return dots_queries<2>(q, q_stride, packed, tiles, head_dim, out, out_stride);
        case 3:
            return dots_queries<3>(q, q_stride, packed, tiles, head_dim, out, out_stride);
        default:
            return dots_queries<4>(q, q_stride, packed, tiles, head_dim, out, out_stride);
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
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), kVnni ? offset_key(b[i]) : b[i]);
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

// The quads in which one of kQueries rows of c has a share, into the list; returns how many. *each grows by
// how many the rows have one by one.
template <int kQueries>
DQK_TARGET inline int64_t keep_quads(const uint8_t* c, int64_t c_stride, int64_t count, int32_t* list,
                                     int64_t* each) {
    int64_t found = 0;
    for (int64_t j = 0; j < count; j += 8 * kQuadKeys) {
        int none = 0xFF;
        for (int i = 0; i < kQueries; ++i) {
            const __m256i quads = load32(reinterpret_cast<const int8_t*>(c + i * c_stride + j));
            const __m256i zero = _mm256_cmpeq_epi32(quads, _mm256_setzero_si256());
            const int zeros = _mm256_movemask_ps(_mm256_castsi256_ps(zero));
            none &= zeros;
            *each += kKept.count[zeros];
        }
        const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kKept.lanes[none]));
        store(list + found, _mm256_add_epi32(_mm256_cvtepu8_epi32(lanes),
                                             _mm256_set1_epi32(static_cast<int32_t>(j / kQuadKeys))));
        found += kKept.count[none];
    }
    return found;
}

// One quad of keys; the sum of query i and vector v has place v * kQueries + i.
template <int kQueries, int kPlaces, int... kAt>
DQK_TARGET inline void sum_step(const uint8_t* c, int64_t c_stride, const int8_t* quad, Sums<kPlaces>& sums,
                                std::integer_sequence<int, kAt...>) {
    __m256i share[kQueries];
    for (int i = 0; i < kQueries; ++i) share[i] = broadcast4(c + i * c_stride);
    ((sums.at[kAt] = dot4(sums.at[kAt], share[kAt % kQueries], load32(quad + kAt / kQueries * 32))), ...);
}
template <int kPlaces, int... kAt>
DQK_TARGET inline void sum_start(Sums<kPlaces>& sums, std::integer_sequence<int, kAt...>) {
    ((sums.at[kAt] = _mm256_setzero_si256()), ...);
}
template <int kQueries, int kPlaces, int... kAt>
DQK_TARGET inline void sum_store(const Sums<kPlaces>& sums, int32_t* total, int64_t total_stride,
                                 std::integer_sequence<int, kAt...>) {
    (store(total + kAt % kQueries * total_stride + kAt / kQueries * 8, sums.at[kAt]), ...);
}

// kVectors * 8 elements from `packed` on, whose quads are `stride` bytes apart.
template <int kQueries, int kVectors>
DQK_TARGET inline void sum_quads(const uint8_t* c, int64_t c_stride, const int32_t* list, int64_t found,
                                 const int8_t* packed, int64_t stride, int32_t* total, int64_t total_stride) {
    constexpr std::make_integer_sequence<int, kQueries * kVectors> kPlaces;
    Sums<kQueries * kVectors> sums;
    sum_start(sums, kPlaces);
    pin_sums(sums, kPlaces);
    for (int64_t n = 0; n < found; ++n) {
        const int64_t quad = list[n];
        sum_step<kQueries>(c + quad * kQuadKeys, c_stride, packed + quad * stride, sums, kPlaces);
        pin_sums(sums, kPlaces);
    }
    sum_store<kQueries>(sums, total, total_stride, kPlaces);
}

template <int kQueries>
DQK_TARGET inline void sum_listed(const uint8_t* c, int64_t c_stride, const int32_t* list, int64_t found,
                                  const int8_t* packed, int64_t head_dim, int32_t* total,
                                  int64_t total_stride) {
    constexpr int kWide = kQueries == 1 ? 8 : 4;  // sums in registers
    const int64_t vectors = round_up(head_dim, 8) / 8, stride = vectors * 32;
    int64_t v = 0;
    for (; v + kWide <= vectors; v += kWide)
        sum_quads<kQueries, kWide>(c, c_stride, list, found, packed + v * 32, stride, total + v * 8,
                                   total_stride);
    for (; v < vectors; ++v)
        sum_quads<kQueries, 1>(c, c_stride, list, found, packed + v * 32, stride, total + v * 8,
                               total_stride);
}

// Neighbours see much the same keys, and values that several of them take are read once. Four go their own
// ways where they take more than twice as many values together as one of them does, two unless they take the
// same.
template <int kQueries>
DQK_TARGET void sum_together(const uint8_t* c, int64_t c_stride, int64_t count, const int8_t* packed,
                             int64_t head_dim, int32_t* list, int32_t* total, int64_t total_stride) {
    int64_t each = 0;
    const int64_t found = keep_quads<kQueries>(c, c_stride, count, list, &each);
    if (kQueries == 1 || 2 * found <= each)
        return sum_listed<kQueries>(c, c_stride, list, found, packed, head_dim, total, total_stride);
    for (int i = 0; i < kQueries; ++i)
        sum_together<1>(c + i * c_stride, c_stride, count, packed, head_dim, list, total + i * total_stride,
                        total_stride);
}

DQK_TARGET void sum_packed(const uint8_t* c, int64_t c_stride, int64_t queries, int64_t count,
                           const int8_t* packed, int64_t head_dim, int32_t* list, int32_t* total,
                           int64_t total_stride) {
    for (; queries >= kSumQueries; queries -= kSumQueries) {
        sum_together<kSumQueries>(c, c_stride, count, packed, head_dim, list, total, total_stride);
        c += kSumQueries * c_stride;
        total += kSumQueries * total_stride;
    }
    for (; queries > 0; --queries, c += c_stride, total += total_stride)
        sum_together<1>(c, c_stride, count, packed, head_dim, list, total, total_stride);
}
