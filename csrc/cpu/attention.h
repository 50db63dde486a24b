// What one instruction set offers the attention of a CPU: loops over the keys of one query. What they are
// loops of, in which order and over which memory, is in attention.cpp, once.
//
// A result depends on no loop: sums are of integers, the maximum has no order, and each float step stands for
// one key alone. So prefill and decoding, few keys or many, one thread or eight give the same bits, and an
// instruction set has only `exp` to get right, for which exp.h prescribes every step.
#pragma once
#include <cstdint>

#include "dqk/api.h"

namespace dqk {

// Rows of codes as they lie in memory, one per key.
struct KeyRows {
    const int8_t* base;
    int64_t stride;         // in bytes, between neighbouring keys; not used with `offset`
    const int64_t* offset;  // bytes from `base` to each key, or nullptr
    const int8_t* end;      // the first byte that may not be read

    const int8_t* row(int64_t key) const { return base + (offset == nullptr ? key * stride : offset[key]); }
};

// The same codes once more, for several queries: in tiles of 8 keys, whose lanes become the lanes of a score,
// and in quads of 4 keys, whose products are added while they are bytes.
//   keys:   [tile of 8 keys][4 elements][8 keys][4]; elements past head_dim are 0
//   values: [quad of 4 keys][elements][4 keys]
constexpr int64_t kTileKeys = 8;
constexpr int64_t kQuadKeys = 4;
constexpr int64_t kQueryTile = 4;  // queries that share one pass over packed keys

// Buffers of codes and scores are this much longer than their last element, so that whole vectors fit.
constexpr int64_t kSlack = 32;

constexpr int64_t round_up(int64_t a, int64_t to) {
    return (a + to - 1) / to * to;
}

struct Extremes {
    float top;            // the largest score of the visible keys, -inf without any
    uint32_t v_max_bits;  // the largest V scale of the visible keys, 0 without any
    bool has_nan;         // among the scores of visible keys
};

struct AttentionFunctions {
    // out[j] = sum of q times row `first + j`, for j < count. q is padded with zeros to a multiple of 32; out
    // has room for `count` rounded up to 8.
    void (*dots_rows)(const int8_t* q, const KeyRows& keys, int64_t first, int64_t count, int64_t head_dim,
                      int32_t* out);
    // Likewise for `queries` (1 to 4) rows of q and whole tiles: out[i * out_stride + j].
    void (*dots_packed)(const int8_t* q, int64_t q_stride, int64_t queries, const int8_t* packed,
                        int64_t tiles, int64_t head_dim, int32_t* out, int64_t out_stride);
    // 8 rows of keys, `stride` bytes apart and padded with zeros to a multiple of 32, into one tile, in which
    // the codes may stand with an offset of the instruction set's own.
    void (*pack_keys)(const int8_t* rows, int64_t stride, int64_t head_dim, int8_t* out);
    // 4 rows of values into one quad of `round_up(head_dim, 8)` elements.
    void (*pack_values)(const int8_t* rows, int64_t stride, int64_t head_dim, int8_t* out);

    // Dots become scores, in place, as the bits of floats: s = dot * q_scale * k_scale[j] (+ bias[j]), and
    // -inf where mask[j] is 0 and from `count` to its next multiple of 8.
    Extremes (*scores)(int32_t* work, int64_t count, float q_scale, const float* k_scale,
                       const float* v_scale, const float* bias, const uint8_t* mask);
    // c[j] = round(t min(1, v_scale[j] v_inv)) with t = 127 exp(s - shift); returns the sum of
    // e[j] = round(t).
    int32_t (*shares)(const int32_t* work, int64_t count, float shift, const float* v_scale, float v_inv,
                      uint8_t* c);

    // total[d] = sum of c[j] times element d of row j. From `count` to its next multiple of 32 c is 0. c,
    // which is used up, and `list` have room for `count` rounded up to 8 and one more, total for head_dim
    // rounded up to 32.
    void (*sum_rows)(uint8_t* c, int64_t count, const KeyRows& values, int64_t head_dim, int32_t* list,
                     int32_t* total);
    // Likewise for `queries` (1 to 4) rows of c, which stay as they are: total[i * total_stride + d].
    void (*sum_packed)(const uint8_t* c, int64_t c_stride, int64_t queries, int64_t count,
                       const int8_t* packed, int64_t head_dim, int32_t* list, int32_t* total,
                       int64_t total_stride);

    // out[d] = float(total[d]) * v_max / weight; out has room for head_dim rounded up to 8.
    void (*divide)(const int32_t* total, int64_t head_dim, float v_max, float weight, float* out);
};

const AttentionFunctions& scalar_attention_functions();

#if defined(__x86_64__)
const AttentionFunctions& avx2_attention_functions();
const AttentionFunctions& avx_vnni_attention_functions();
const AttentionFunctions& avx512_vnni_attention_functions();
#endif
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
const AttentionFunctions& dotprod_attention_functions();
#endif

// Those of `isa`.
const AttentionFunctions& attention_functions(Isa isa);

}  // namespace dqk
