// The loops of attention.h in plain C++, and the choice of faster ones.
#include <cstring>

#include "cpu/attention.h"
#include "cpu/share.h"

namespace dqk {
namespace {

void dots_rows(const int8_t* q, const KeyRows& keys, int64_t first, int64_t count, int64_t head_dim,
               int32_t* out) {
    for (int64_t j = 0; j < count; ++j) {
        const int8_t* row = keys.row(first + j);
        int32_t sum = 0;
        for (int64_t d = 0; d < head_dim; ++d) sum += q[d] * row[d];
        out[j] = sum;
    }
}

void dots_packed(const int8_t* q, int64_t q_stride, int64_t queries, const int8_t* packed, int64_t tiles,
                 int64_t head_dim, int32_t* out, int64_t out_stride) {
    const int64_t quads = round_up(head_dim, 4) / 4;
    for (int64_t tile = 0; tile < tiles; ++tile, packed += quads * 32)
        for (int64_t i = 0; i < queries; ++i) {
            int32_t sums[kTileKeys] = {};
            for (int64_t quad = 0; quad < quads; ++quad)
                for (int64_t lane = 0; lane < 32; ++lane)
                    sums[lane / 4] += q[i * q_stride + quad * 4 + lane % 4] * packed[quad * 32 + lane];
            std::memcpy(out + i * out_stride + tile * kTileKeys, sums, sizeof sums);
        }
}

void pack_keys(const int8_t* rows, int64_t stride, int64_t head_dim, int8_t* out) {
    for (int64_t d = 0; d < head_dim; d += 4)
        for (int64_t key = 0; key < kTileKeys; ++key, out += 4) std::memcpy(out, rows + key * stride + d, 4);
}

void pack_values(const int8_t* rows, int64_t stride, int64_t head_dim, int8_t* out) {
    for (int64_t d = 0; d < round_up(head_dim, 8); ++d)
        for (int64_t key = 0; key < kQuadKeys; ++key) *out++ = rows[key * stride + d];
}

Extremes scores(int32_t* work, int64_t count, float q_scale, const float* k_scale, const float* v_scale,
                const float* bias, const uint8_t* mask) {
    const float hidden = -bits_float(kInfBits);
    Extremes found = {hidden, 0, false};
    for (int64_t j = 0; j < round_up(count, 8); ++j) {
        float s = hidden;
        if (j < count && (mask == nullptr || mask[j] != 0)) {
            s = static_cast<float>(work[j]) * q_scale * k_scale[j];
            if (bias != nullptr) s += bias[j];
            found.has_nan |= s != s;
            found.top = s > found.top ? s : found.top;
            const uint32_t bits = magnitude_bits(v_scale[j]);
            found.v_max_bits = bits > found.v_max_bits ? bits : found.v_max_bits;
        }
        work[j] = static_cast<int32_t>(float_bits(s));
    }
    return found;
}

int32_t shares(const int32_t* work, int64_t count, float shift, const float* v_scale, float v_inv,
               uint8_t* c) {
    return shares_of(work, count, shift, v_scale, v_inv, c);
}

void sum_rows(uint8_t* c, int64_t count, const KeyRows& values, int64_t head_dim, int32_t*, int32_t* total) {
    std::memset(total, 0, static_cast<size_t>(head_dim) * sizeof(int32_t));
    for (int64_t j = 0; j < count; ++j) {
        if (c[j] == 0) continue;
        const int8_t* row = values.row(j);
        for (int64_t d = 0; d < head_dim; ++d) total[d] += c[j] * row[d];
    }
}

void sum_packed(const uint8_t* c, int64_t c_stride, int64_t queries, int64_t count, const int8_t* packed,
                int64_t head_dim, int32_t*, int32_t* total, int64_t total_stride) {
    const int64_t elements = round_up(head_dim, 8);
    for (int64_t i = 0; i < queries; ++i, c += c_stride, total += total_stride) {
        std::memset(total, 0, static_cast<size_t>(head_dim) * sizeof(int32_t));
        for (int64_t j = 0; j < count; ++j) {
            if (c[j] == 0) continue;
            const int8_t* quad = packed + j / kQuadKeys * elements * kQuadKeys + j % kQuadKeys;
            for (int64_t d = 0; d < head_dim; ++d) total[d] += c[j] * quad[d * kQuadKeys];
        }
    }
}

void divide(const int32_t* total, int64_t head_dim, float v_max, float weight, float* out) {
    for (int64_t d = 0; d < head_dim; ++d) out[d] = static_cast<float>(total[d]) * v_max / weight;
}

}  // namespace

const AttentionFunctions& scalar_attention_functions() {
    static constexpr AttentionFunctions kFunctions = {dots_rows, dots_packed, pack_keys,  pack_values, scores,
                                                      shares,    sum_rows,    sum_packed, divide};
    return kFunctions;
}

const AttentionFunctions& attention_functions(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512_vnni || isa == Isa::amx_int8) return avx512_vnni_attention_functions();
    if (isa == Isa::avx_vnni) return avx_vnni_attention_functions();
    if (isa == Isa::avx2) return avx2_attention_functions();
#endif
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
    if (isa == Isa::dotprod) return dotprod_attention_functions();
#endif
    (void)isa;
    return scalar_attention_functions();
}

}  // namespace dqk
