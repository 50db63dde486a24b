// What prefill and decoding share: the memory of a task, and the way of a few queries through it.
#pragma once
#include <cstring>

#include "cpu/attention.h"
#include "cpu/buffer.h"
#include "cpu/key_rows.h"

namespace dqk {

constexpr int64_t kKeyBlock = 256;  // keys that several queries go through while they are in the cache

// The keys that queries of one head see, and their codes in one of two forms.
struct Keys {
    bool packed;
    KeyRows k_rows, v_rows;
    const int8_t *k_packed, *v_packed;
    const float *k_scale, *v_scale;  // [keys], adjacent
};

inline int64_t packed_key_bytes(int64_t keys, int64_t head_dim) {
    return round_up(keys, kTileKeys) * round_up(head_dim, 4);
}
inline int64_t packed_value_bytes(int64_t keys, int64_t head_dim) {
    return round_up(keys, kTileKeys) * round_up(head_dim, 8);
}

// 8 rows on their way into packed form, padded with zeros as the loops want them.
class Tile {
  public:
    explicit Tile(int64_t head_dim) : head_dim_(head_dim), stride_(round_up(head_dim, 32)) {}
    int64_t bytes() const { return kTileKeys * stride_; }
    void place(int8_t* memory) {
        rows_ = memory;
        std::memset(rows_, 0, static_cast<size_t>(bytes()));
    }
    int8_t* row(int64_t i) const { return rows_ + i * stride_; }
    void clear(int64_t i) const { std::memset(row(i), 0, static_cast<size_t>(head_dim_)); }
    void pack_keys(const AttentionFunctions& loops, int64_t tile, int8_t* out) const {
        loops.pack_keys(rows_, stride_, head_dim_, out + tile * kTileKeys * round_up(head_dim_, 4));
    }
    void pack_values(const AttentionFunctions& loops, int64_t tile, int8_t* out) const {
        const int64_t quad = kQuadKeys * round_up(head_dim_, 8);
        for (int64_t i = 0; i < kTileKeys / kQuadKeys; ++i)
            loops.pack_values(row(i * kQuadKeys), stride_, head_dim_,
                              out + (tile * (kTileKeys / kQuadKeys) + i) * quad);
    }

  private:
    int64_t head_dim_, stride_;
    int8_t* rows_ = nullptr;
};

template <DType kType>
inline void scaled_row(const void* x, int64_t n, float factor, float* out) {
    const auto* row = static_cast<const typename Element<kType>::type*>(x);
    for (int64_t i = 0; i < n; ++i) out[i] = Element<kType>::widen(row[i]) * factor;
}

// q * softmax_scale in fp32, which is what gets quantized.
inline void scaled_row(const void* x, DType dtype, int64_t n, float factor, float* out) {
    if (dtype == DType::float16) return scaled_row<DType::float16>(x, n, factor, out);
    if (dtype == DType::bfloat16) return scaled_row<DType::bfloat16>(x, n, factor, out);
    return scaled_row<DType::float32>(x, n, factor, out);
}

// Bytes between the codes of two queries.
inline int64_t code_stride(int64_t head_dim) {
    return round_up(head_dim, 32);
}

// What all tasks of a call read.
struct Call {
    const AttentionSizes& sizes;
    const AttentionFunctions& loops;
    RowRule q_rule;  // of fp32 rows
    const Operand& q;
    const Operand& mask;
    const Operand& bias;
    void* out;
    bool by_token;

    int64_t out_bytes() const { return sizes.head_dim * element_bytes(q.dtype); }
};

// One query: which it is, and how many keys it may see.
struct Query {
    int64_t batch, head, query;
    int64_t limit;
};

inline int64_t limit_of(const AttentionSizes& sizes, int64_t keys, int64_t query) {
    const int64_t limit = sizes.causal ? keys - sizes.queries + 1 + query : keys;
    return limit < 0 ? 0 : limit > keys ? keys : limit;
}

// The memory of one task, and the way of up to kQueryTile queries through it.
class Worker {
  public:
    Worker(const Call& call, int64_t most_keys)
        : call_(call),
          dim_(call.sizes.head_dim),
          q_stride_(code_stride(dim_)),
          work_stride_(round_up(most_keys, kSlack) + kSlack),
          most_keys_(most_keys),
          buffer_(bytes()) {
        if (buffer_.empty()) return;
        codes_ = buffer_.take<int8_t>(kQueryTile * q_stride_);
        std::memset(codes_, 0, static_cast<size_t>(kQueryTile * q_stride_));
        scaled_ = buffer_.take<float>(q_stride_);
        total_ = buffer_.take<int32_t>(kQueryTile * q_stride_);
        work_ = buffer_.take<int32_t>(kQueryTile * work_stride_);
        list_ = buffer_.take<int32_t>(work_stride_);
        shares_ = buffer_.take<uint8_t>(kQueryTile * work_stride_);
        if (call.bias.data != nullptr) bias_ = buffer_.take<float>(most_keys_);
        if (call.mask.data != nullptr) mask_ = buffer_.take<uint8_t>(most_keys_);
    }
    bool empty() const { return buffer_.empty(); }

    void attend(const Keys& keys, const Query* queries, int64_t count) {
        float scale[kQueryTile];
        for (int64_t i = 0; i < count; ++i) {
            const Query& one = queries[i];
            scaled_row(row_of(call_.q, one.batch, one.head, one.query), call_.q.dtype, dim_,
                       call_.sizes.softmax_scale, scaled_);
            scale[i] = call_.q_rule(scaled_, codes_ + i * q_stride_);
        }
        attend(keys, queries, count, codes_, scale);
    }

    // Likewise with the codes of the queries, padded with zeros to code_stride(), and their scales.
    void attend(const Keys& keys, const Query* queries, int64_t count, const int8_t* codes,
                const float* scale) {
        int64_t limit = 0;
        for (int64_t i = 0; i < count; ++i) limit = queries[i].limit > limit ? queries[i].limit : limit;
        if (keys.packed)
            call_.loops.dots_packed(codes, q_stride_, count, keys.k_packed,
                                    round_up(limit, kTileKeys) / kTileKeys, dim_, work_, work_stride_);
        else
            for (int64_t first = 0; first < limit; first += kKeyBlock)
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t left = queries[i].limit - first;
                    if (left > 0)
                        call_.loops.dots_rows(codes + i * q_stride_, keys.k_rows, first,
                                              left < kKeyBlock ? left : kKeyBlock, dim_,
                                              work_ + i * work_stride_ + first);
                }
        Shared shared[kQueryTile];
        const int64_t padded = round_up(limit, kSlack);
        for (int64_t i = 0; i < count; ++i) {
            uint8_t* c = shares_ + i * work_stride_;
            shared[i] = share(keys, queries[i], scale[i], work_ + i * work_stride_, c);
            const int64_t has = shared[i].nan ? 0 : queries[i].limit;
            std::memset(c + has, 0, static_cast<size_t>(padded - has));
        }
        if (keys.packed)
            call_.loops.sum_packed(shares_, work_stride_, count, limit, keys.v_packed, dim_, list_, total_,
                                   q_stride_);
        else
            for (int64_t i = 0; i < count; ++i)
                call_.loops.sum_rows(shares_ + i * work_stride_, queries[i].limit, keys.v_rows, dim_, list_,
                                     total_ + i * q_stride_);
        for (int64_t i = 0; i < count; ++i) finish(queries[i], shared[i], total_ + i * q_stride_);
    }

  private:
    int64_t bytes() const {
        return Buffer::bytes_of<int8_t>(kQueryTile * q_stride_) + Buffer::bytes_of<float>(q_stride_) +
               Buffer::bytes_of<int32_t>(kQueryTile * q_stride_) +
               Buffer::bytes_of<int32_t>(kQueryTile * work_stride_) +
               Buffer::bytes_of<int32_t>(work_stride_) +
               Buffer::bytes_of<uint8_t>(kQueryTile * work_stride_) + Buffer::bytes_of<float>(most_keys_) +
               Buffer::bytes_of<uint8_t>(most_keys_);
    }

    // What the shares of a query are of.
    struct Shared {
        bool nan;  // so is the output, and nobody has a share
        float v_max, weight;
    };

    // From the products with the keys to the shares of those within the query's limit.
    Shared share(const Keys& keys, const Query& one, float q_scale, int32_t* work, uint8_t* c) {
        if (one.limit == 0) return {false, 0.0f, 1.0f};
        const Extremes found = call_.loops.scores(work, one.limit, q_scale, keys.k_scale, keys.v_scale,
                                                  bias_row(one), mask_row(one));
        if (found.has_nan || float_bits(found.top) == kInfBits || non_finite(found.v_max_bits))
            return {true, 0.0f, 1.0f};
        const float v_max = bits_float(found.v_max_bits);
        // Without a finite score the scores stay as they are: -inf, whose share is 0.
        const float shift = float_bits(found.top) == (kInfBits | 0x80000000u) ? 0.0f : found.top;
        const int32_t weight = call_.loops.shares(work, one.limit, shift, keys.v_scale,
                                                  div_rn(1.0f, v_max > 0.0f ? v_max : 1.0f), c);
        return {false, v_max, weight == 0 ? 1.0f : static_cast<float>(weight)};
    }

    // From the sums to a row of the output.
    void finish(const Query& one, const Shared& shared, const int32_t* total) {
        float* result = scaled_;
        if (shared.nan)
            for (int64_t d = 0; d < dim_; ++d) result[d] = nan_row().scale;
        else
            call_.loops.divide(total, dim_, shared.v_max, shared.weight, result);
        store(one, result);
    }

    void store(const Query& one, const float* result) const {
        const AttentionSizes& sizes = call_.sizes;
        const int64_t row = call_.by_token ? (one.batch * sizes.queries + one.query) * sizes.heads + one.head
                                           : (one.batch * sizes.heads + one.head) * sizes.queries + one.query;
        char* out = static_cast<char*>(call_.out) + row * call_.out_bytes();
        if (call_.q.dtype == DType::float32) {
            std::memcpy(out, result, static_cast<size_t>(call_.out_bytes()));
            return;
        }
        for (int64_t d = 0; d < dim_; ++d) store_element(out, call_.q.dtype, d, result[d]);
    }

    // Where the row of an operand is not adjacent floats, it is copied.
    const float* bias_row(const Query& one) {
        const Operand& bias = call_.bias;
        if (bias.data == nullptr) return nullptr;
        const char* row = row_of(bias, one.batch, one.head, one.query);
        const int64_t step = bias.stride[3];
        if (bias.dtype == DType::float32 && step == 1) return reinterpret_cast<const float*>(row);
        for (int64_t j = 0; j < one.limit; ++j) bias_[j] = load_element(row, bias.dtype, j * step);
        return bias_;
    }

    const uint8_t* mask_row(const Query& one) {
        const Operand& mask = call_.mask;
        if (mask.data == nullptr) return nullptr;
        const char* row = row_of(mask, one.batch, one.head, one.query);
        const int64_t step = mask.stride[3];
        if (step == 1) return reinterpret_cast<const uint8_t*>(row);
        for (int64_t j = 0; j < one.limit; ++j) mask_[j] = static_cast<uint8_t>(row[j * step]);
        return mask_;
    }

    const Call& call_;
    int64_t dim_, q_stride_, work_stride_, most_keys_;
    Buffer buffer_;
    int8_t* codes_ = nullptr;
    float* scaled_ = nullptr;
    int32_t *total_ = nullptr, *work_ = nullptr, *list_ = nullptr;
    uint8_t* shares_ = nullptr;
    float* bias_ = nullptr;
    uint8_t* mask_ = nullptr;
};

// What every implementation refuses, but for what only one of them has.
Status check(const AttentionSizes& sizes, const Operand& q, const Operand& mask, const Operand& bias);

// Into how many tasks `items` are worth cutting, for so many pairs of a query and a key.
int64_t tasks_for(const AttentionSizes& sizes, int64_t items, int64_t pairs);

// Of the queries, times softmax_scale.
RowRule query_rule(const AttentionSizes& sizes, const Operand& q, Isa isa);

void clear_output(const AttentionSizes& sizes, DType dtype, void* out);

}  // namespace dqk
