// The loops of attention.h for Arm with the dot product of bytes, on vectors of 16 bytes. They were run over
// modelled instructions (tests/sim/neon_model.h) and in an emulator, never on an Arm processor.
//
// sdot takes signed bytes on both sides. Codes are such bytes, and so are shares, of which none is above 127,
// so one instruction multiplies 16 of them exactly, without the detour over |k| of attention_vector.inl. Each
// float step is the scalar one of a key (attention_scalar.cpp, share.h); nothing is fused.
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
#include "cpu/neon.h"
//
#include "cpu/attention.h"
#include "cpu/prefetch.h"
#include "cpu/share.h"

namespace dqk {
namespace {

// The last `left` (< 16) elements of a row. What follows is harmless wherever it may be read: it meets a zero
// of q, or ends in elements past head_dim.
DQK_TARGET inline int8x16_t load_rest(const int8_t* p, int64_t left, const int8_t* end) {
    if (end - p >= 16) return vld1q_s8(p);
    int8_t copy[16] = {};
    std::memcpy(copy, p, static_cast<size_t>(left));
    return vld1q_s8(copy);
}

// The sums of each of 4 vectors, in order.
DQK_TARGET inline int32x4_t sum_each(const int32x4_t* v) {
    return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
}

DQK_TARGET void dots_rows(const int8_t* q, const KeyRows& keys, int64_t first, int64_t count,
                          int64_t head_dim, int32_t* out) {
    const int64_t whole = head_dim / 16 * 16;
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
        int32x4_t sums[8];
        for (int i = 0; i < 8; ++i) sums[i] = vdupq_n_s32(0);
        for (int64_t d = 0; d < whole; d += 16) {
            const int8x16_t query = vld1q_s8(q + d);
            for (int i = 0; i < 8; ++i) sums[i] = vdotq_s32(sums[i], vld1q_s8(rows[i] + d), query);
        }
        if (whole < head_dim) {
            const int8x16_t query = vld1q_s8(q + whole);
            for (int i = 0; i < 8; ++i) {
                const int8x16_t key = load_rest(rows[i] + whole, head_dim - whole, keys.end);
                sums[i] = vdotq_s32(sums[i], key, query);
            }
        }
        vst1q_s32(out + j, sum_each(sums));
        vst1q_s32(out + j + 4, sum_each(sums + 4));
    }
}

// One quad of elements of two vectors a tile of keys, times word kWord of each query's 16 bytes.
template <int kWord, int kQueries, int kVectors>
DQK_TARGET inline __attribute__((always_inline)) void add_quad(const int8_t* packed, int64_t tile_bytes,
                                                               const int8x16_t (&four)[kQueries],
                                                               int32x4_t (&sums)[kVectors][kQueries]) {
    for (int t = 0; t < kVectors / 2; ++t) {
        const int8x16_t low = vld1q_s8(packed + t * tile_bytes);
        const int8x16_t high = vld1q_s8(packed + t * tile_bytes + 16);
        for (int i = 0; i < kQueries; ++i) {
            sums[2 * t][i] = vdotq_laneq_s32(sums[2 * t][i], low, four[i], kWord);
            sums[2 * t + 1][i] = vdotq_laneq_s32(sums[2 * t + 1][i], high, four[i], kWord);
        }
    }
}

// kTiles tiles at a time: with 4 queries 16 sums, 4 vectors of keys and 4 of queries are in registers.
template <int kQueries, int kTiles>
DQK_TARGET const int8_t* dots_tiles(const int8_t* q, int64_t q_stride, const int8_t* packed, int64_t tiles,
                                    int64_t quads, int32_t* out, int64_t out_stride) {
    const int64_t tile_bytes = quads * 32;
    for (; tiles >= kTiles; tiles -= kTiles, packed += kTiles * tile_bytes, out += kTiles * kTileKeys) {
        int32x4_t sums[2 * kTiles][kQueries];
        for (int t = 0; t < 2 * kTiles; ++t)
            for (int i = 0; i < kQueries; ++i) sums[t][i] = vdupq_n_s32(0);
        for (int64_t quad = 0; quad < quads; quad += 4) {
            const int8_t* at = packed + quad * 32;
            const int64_t left = quads - quad;
            int8x16_t four[kQueries];
            for (int i = 0; i < kQueries; ++i) four[i] = vld1q_s8(q + i * q_stride + quad * 4);
            add_quad<0>(at, tile_bytes, four, sums);
            if (left > 1) add_quad<1>(at + 32, tile_bytes, four, sums);
            if (left > 2) add_quad<2>(at + 64, tile_bytes, four, sums);
            if (left > 3) add_quad<3>(at + 96, tile_bytes, four, sums);
        }
        for (int t = 0; t < 2 * kTiles; ++t)
            for (int i = 0; i < kQueries; ++i) vst1q_s32(out + i * out_stride + t * 4, sums[t][i]);
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

// 4 rows of 4 words -> the words of each column.
DQK_TARGET inline void transpose(const int8_t* rows, int64_t stride, int8x16_t* column) {
    int32x4_t row[4];
    for (int i = 0; i < 4; ++i) row[i] = vreinterpretq_s32_s8(vld1q_s8(rows + i * stride));
    const int32x4_t even_low = vzip1q_s32(row[0], row[2]), even_high = vzip2q_s32(row[0], row[2]);
    const int32x4_t odd_low = vzip1q_s32(row[1], row[3]), odd_high = vzip2q_s32(row[1], row[3]);
    column[0] = vreinterpretq_s8_s32(vzip1q_s32(even_low, odd_low));
    column[1] = vreinterpretq_s8_s32(vzip2q_s32(even_low, odd_low));
    column[2] = vreinterpretq_s8_s32(vzip1q_s32(even_high, odd_high));
    column[3] = vreinterpretq_s8_s32(vzip2q_s32(even_high, odd_high));
}

DQK_TARGET void pack_keys(const int8_t* rows, int64_t stride, int64_t head_dim, int8_t* out) {
    const int64_t quads = round_up(head_dim, 4) / 4;
    for (int64_t first = 0; first < quads; first += 4) {
        int8x16_t low[4], high[4];  // of keys 0 to 3, and 4 to 7
        transpose(rows + first * 4, stride, low);
        transpose(rows + first * 4 + 4 * stride, stride, high);
        for (int64_t i = 0; i < 4 && first + i < quads; ++i, out += 32) {
            vst1q_s8(out, low[i]);
            vst1q_s8(out + 16, high[i]);
        }
    }
}

DQK_TARGET void pack_values(const int8_t* rows, int64_t stride, int64_t head_dim, int8_t* out) {
    const int64_t elements = round_up(head_dim, 8);
    for (int64_t d = 0; d < elements; d += 8, out += 32) {
        int8x8x4_t quad;
        for (int i = 0; i < 4; ++i) quad.val[i] = vld1_s8(rows + i * stride + d);
        vst4_s8(out, quad);
    }
}

struct Running {
    float32x4_t top;
    uint32x4_t v_max, number;  // number: all ones in lanes that have seen no NaN
};

// 4 scores. Lanes outside `seen` are hidden, whatever they hold.
DQK_TARGET inline float32x4_t score4(int32x4_t dots, float32x4_t q_scale, float32x4_t k_scale,
                                     float32x4_t v_scale, const float* bias, uint32x4_t seen,
                                     Running* running) {
    float32x4_t s = vmulq_f32(vmulq_f32(vcvtq_f32_s32(dots), q_scale), k_scale);
    if (bias != nullptr) s = vaddq_f32(s, vld1q_f32(bias));
    s = vbslq_f32(seen, s, vdupq_n_f32(-bits_float(kInfBits)));
    const uint32x4_t size =
        vandq_u32(vandq_u32(vreinterpretq_u32_f32(v_scale), seen), vdupq_n_u32(0x7FFFFFFF));
    running->number = vandq_u32(running->number, vceqq_f32(s, s));
    running->top = vmaxnmq_f32(running->top, s);  // the number, where the other is NaN
    running->v_max = vmaxq_u32(running->v_max, size);
    return s;
}

// Scores of 8 keys, in place; without a mask all of them are seen.
DQK_TARGET inline void score8(int32_t* work, float32x4_t q_scale, const float* k_scale, const float* v_scale,
                              const float* bias, const uint8_t* mask, Running* running) {
    uint32x4_t low = vdupq_n_u32(~0u), high = low;
    if (mask != nullptr) {
        const uint8x8_t bytes = vld1_u8(mask);
        const int16x8_t seen = vmovl_s8(vreinterpret_s8_u8(vtst_u8(bytes, bytes)));
        low = vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(seen)));
        high = vreinterpretq_u32_s32(vmovl_s16(vget_high_s16(seen)));
    }
    const float32x4_t a =
        score4(vld1q_s32(work), q_scale, vld1q_f32(k_scale), vld1q_f32(v_scale), bias, low, running);
    const float32x4_t b = score4(vld1q_s32(work + 4), q_scale, vld1q_f32(k_scale + 4), vld1q_f32(v_scale + 4),
                                 bias == nullptr ? nullptr : bias + 4, high, running);
    vst1q_s32(work, vreinterpretq_s32_f32(a));
    vst1q_s32(work + 4, vreinterpretq_s32_f32(b));
}

DQK_TARGET Extremes scores(int32_t* work, int64_t count, float q_scale, const float* k_scale,
                           const float* v_scale, const float* bias, const uint8_t* mask) {
    const float32x4_t scale = vdupq_n_f32(q_scale);
    Running running = {vdupq_n_f32(-bits_float(kInfBits)), vdupq_n_u32(0), vdupq_n_u32(~0u)};
    int64_t j = 0;
    for (; j + 8 <= count; j += 8)
        score8(work + j, scale, k_scale + j, v_scale + j, bias == nullptr ? nullptr : bias + j,
               mask == nullptr ? nullptr : mask + j, &running);
    if (j < count) {  // the rest, from copies: nothing is read past the end of an operand
        float k[8] = {}, v[8] = {}, added[8] = {};
        uint8_t seen[8] = {};
        const auto left = static_cast<size_t>(count - j);
        std::memcpy(k, k_scale + j, left * sizeof(float));
        std::memcpy(v, v_scale + j, left * sizeof(float));
        if (bias != nullptr) std::memcpy(added, bias + j, left * sizeof(float));
        if (mask == nullptr)
            std::memset(seen, 1, left);
        else
            std::memcpy(seen, mask + j, left);
        score8(work + j, scale, k, v, bias == nullptr ? nullptr : added, seen, &running);
    }
    return {vmaxnmvq_f32(running.top), vmaxvq_u32(running.v_max), vminvq_u32(running.number) == 0};
}

DQK_TARGET int32_t shares(const int32_t* work, int64_t count, float shift, const float* v_scale, float v_inv,
                          uint8_t* c) {
    return shares_of(work, count, shift, v_scale, v_inv, c);
}

// total[0..7] += 8 sums of 16 bits.
DQK_TARGET inline void add_words(int16x8_t words, int32_t* total) {
    vst1q_s32(total, vaddw_s16(vld1q_s32(total), vget_low_s16(words)));
    vst1q_s32(total + 4, vaddw_high_s16(vld1q_s32(total + 4), words));
}

// kVectors * 16 elements from `first` on. Products are added while they have 16 bits, as long as the shares
// add up to 255: 255 * 128 < 2^15.
template <int kVectors, bool kWhole>
DQK_TARGET void sum_keys(const uint8_t* c, const int32_t* list, int64_t found, const KeyRows& values,
                         int64_t first, int64_t left, int32_t* total) {
    int16x8_t low[kVectors], high[kVectors];
    for (int i = 0; i < kVectors; ++i) low[i] = high[i] = vdupq_n_s16(0);
    int32_t room = 255;
    for (int64_t n = 0; n < found; ++n) {
        if (c[n] > room) {
            for (int i = 0; i < kVectors; ++i) {
                add_words(low[i], total + i * 16);
                add_words(high[i], total + i * 16 + 8);
                low[i] = high[i] = vdupq_n_s16(0);
            }
            room = 255;
        }
        room -= c[n];
        if (n + kKeysAhead < found) ask_for(values.row(list[n + kKeysAhead]) + first, kVectors * 16);
        const int8x16_t share = vdupq_n_s8(static_cast<int8_t>(c[n]));
        const int8_t* row = values.row(list[n]) + first;
        for (int i = 0; i < kVectors; ++i) {
            const int8x16_t v = kWhole ? vld1q_s8(row + i * 16) : load_rest(row, left, values.end);
            low[i] = vmlal_s8(low[i], vget_low_s8(v), vget_low_s8(share));
            high[i] = vmlal_high_s8(high[i], v, share);
        }
    }
    for (int i = 0; i < kVectors; ++i) {
        add_words(low[i], total + i * 16);
        add_words(high[i], total + i * 16 + 8);
    }
}

// Brings the shares that are not 0 to the front of c, and their keys into the list; returns how many. Most
// keys of a long text have no share of a query: eight of them are passed over at once.
inline int64_t keep_shares(uint8_t* c, int64_t count, int32_t* list) {
    int64_t found = 0;
    for (int64_t j = 0; j < count; j += 8) {
        uint64_t eight;
        std::memcpy(&eight, c + j, 8);
        if (eight == 0) continue;
        for (int64_t i = j; i < j + 8; ++i) {  // what is written stands at i or before it
            const uint8_t share = c[i];
            c[found] = share;
            list[found] = static_cast<int32_t>(i);
            found += share != 0;
        }
    }
    return found;
}

DQK_TARGET void sum_rows(uint8_t* c, int64_t count, const KeyRows& values, int64_t head_dim, int32_t* list,
                         int32_t* total) {
    const int64_t found = keep_shares(c, count, list);
    std::memset(total, 0, static_cast<size_t>(round_up(head_dim, 16)) * sizeof(int32_t));
    int64_t d = 0;
    for (; d + 64 <= head_dim; d += 64) sum_keys<4, true>(c, list, found, values, d, 64, total + d);
    for (; d + 16 <= head_dim; d += 16) sum_keys<1, true>(c, list, found, values, d, 16, total + d);
    if (d < head_dim) sum_keys<1, false>(c, list, found, values, d, head_dim - d, total + d);
}

// kVectors * 4 elements from `packed` on, whose quads are `stride` bytes apart.
template <int kVectors>
DQK_TARGET void sum_quads(const uint8_t* c, const int32_t* list, int64_t found, const int8_t* packed,
                          int64_t stride, int32_t* total) {
    int32x4_t sums[kVectors];
    for (int i = 0; i < kVectors; ++i) sums[i] = vdupq_n_s32(0);
    for (int64_t n = 0; n < found; ++n) {
        int32_t four;
        std::memcpy(&four, c + static_cast<int64_t>(list[n]) * kQuadKeys, 4);
        const int8x16_t share = vreinterpretq_s8_s32(vdupq_n_s32(four));
        const int8_t* quad = packed + list[n] * stride;
        for (int i = 0; i < kVectors; ++i) sums[i] = vdotq_s32(sums[i], vld1q_s8(quad + i * 16), share);
    }
    for (int i = 0; i < kVectors; ++i) vst1q_s32(total + i * 4, sums[i]);
}

DQK_TARGET void sum_packed(const uint8_t* c, int64_t c_stride, int64_t queries, int64_t count,
                           const int8_t* packed, int64_t head_dim, int32_t* list, int32_t* total,
                           int64_t total_stride) {
    const int64_t vectors = round_up(head_dim, 8) / 4, stride = vectors * 16;
    for (int64_t q = 0; q < queries; ++q, c += c_stride, total += total_stride) {
        int64_t found = 0;
        for (int64_t quad = 0; quad * kQuadKeys < count; ++quad) {
            uint32_t four;
            std::memcpy(&four, c + quad * kQuadKeys, 4);
            list[found] = static_cast<int32_t>(quad);
            found += four != 0;
        }
        int64_t i = 0;
        for (; i + 16 <= vectors; i += 16)
            sum_quads<16>(c, list, found, packed + i * 16, stride, total + i * 4);
        for (; i + 4 <= vectors; i += 4) sum_quads<4>(c, list, found, packed + i * 16, stride, total + i * 4);
        for (; i < vectors; i += 2) sum_quads<2>(c, list, found, packed + i * 16, stride, total + i * 4);
    }
}

DQK_TARGET void divide(const int32_t* total, int64_t head_dim, float v_max, float weight, float* out) {
    const float32x4_t factor = vdupq_n_f32(v_max), divisor = vdupq_n_f32(weight);
    for (int64_t d = 0; d < head_dim; d += 4)
        vst1q_f32(out + d, vdivq_f32(vmulq_f32(vcvtq_f32_s32(vld1q_s32(total + d)), factor), divisor));
}

}  // namespace

const AttentionFunctions& dotprod_attention_functions() {
    static constexpr AttentionFunctions kFunctions = {dots_rows, dots_packed, pack_keys,  pack_values, scores,
                                                      shares,    sum_rows,    sum_packed, divide};
    return kFunctions;
}

}  // namespace dqk
#endif
