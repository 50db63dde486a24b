// Attention over float queries, keys and values: all are quantized once, and keys and values packed, in the
// order in which they lie in memory; then each head's queries go by.
#include "cpu/attention.h"

#include <atomic>
#include <cstring>

#include "cpu/attention_call.h"
#include "cpu/threads.h"
#include "dqk/shape.h"

namespace dqk {
namespace {

constexpr int64_t kQueryBlock = 32;  // queries of a task's smallest piece
constexpr int64_t kWorkPerTask =
    1 << 19;  // about 10 us: below, handing it to a thread costs more than it gains

}  // namespace

Status check(const AttentionSizes& sizes, const Operand& q, const Operand& mask, const Operand& bias) {
    int64_t count = 0;
    if (sizes.batch < 0 || sizes.heads < 0 || sizes.queries < 0 || sizes.keys < 0 || sizes.head_dim < 1 ||
        sizes.head_dim > kMaxHeadDim || sizes.keys > kMaxKeys || sizes.mode == ActMode::static_scale ||
        q.stride[3] != 1 || !valid_strides(q) || !valid_strides(mask) || !valid_strides(bias))
        return Status::bad_attention;
    if (q.dtype == DType::int8 || bias.dtype == DType::int8) return Status::bad_dtype;
    if (sizes.clip != 0.0f && (!(sizes.clip > 0.0f) || non_finite(magnitude_bits(sizes.clip))))
        return Status::bad_clip;
    if (!checked_mul(sizes.batch, sizes.heads, &count) || !checked_mul(count, sizes.queries, &count) ||
        !checked_mul(count, sizes.head_dim * 4, &count))
        return Status::size_overflow;
    return Status::ok;
}

int64_t tasks_for(const AttentionSizes& sizes, int64_t items, int64_t pairs) {
    const double work = static_cast<double>(pairs) * static_cast<double>(sizes.head_dim + 64);
    const double worth = work / static_cast<double>(kWorkPerTask);
    int64_t tasks = static_cast<int64_t>(sizes.threads) * 4;
    if (sizes.threads <= 1 || worth < 2.0) return 1;
    if (worth < static_cast<double>(tasks)) tasks = static_cast<int64_t>(worth);
    return tasks < items ? tasks : items;
}

RowRule query_rule(const AttentionSizes& sizes, const Operand& q, Isa isa) {
    RowRule rule = {row_functions(DType::float32, isa), sizes.head_dim,
                    sizes.clip == 0.0f ? kNoClip : sizes.clip, sizes.mode == ActMode::per_tensor, 0};
    if (!rule.per_tensor) return rule;
    float row[kMaxHeadDim];
    for (int64_t b = 0; b < sizes.batch; ++b)
        for (int64_t h = 0; h < sizes.heads; ++h)
            for (int64_t i = 0; i < sizes.queries; ++i) {
                scaled_row(row_of(q, b, h, i), q.dtype, sizes.head_dim, sizes.softmax_scale, row);
                const uint32_t amax = rule.functions.amax_bits(row, sizes.head_dim);
                rule.amax_bits = amax > rule.amax_bits ? amax : rule.amax_bits;
            }
    return rule;
}

void clear_output(const AttentionSizes& sizes, DType dtype, void* out) {
    std::memset(out, 0,
                static_cast<size_t>(sizes.batch * sizes.heads * sizes.queries * sizes.head_dim *
                                    element_bytes(dtype)));
}

namespace {

// The codes of all heads: keys and values packed, queries in rows.
struct Heads {
    int64_t count, queries, keys, q_bytes, k_bytes, v_bytes;  // bytes of a head
    int8_t *q, *k, *v;
    float *q_scale, *k_scale, *v_scale;

    explicit Heads(const AttentionSizes& sizes)
        : count(sizes.batch * sizes.heads),
          queries(sizes.queries),
          keys(sizes.keys),
          q_bytes(sizes.queries * code_stride(sizes.head_dim)),
          k_bytes(packed_key_bytes(sizes.keys, sizes.head_dim)),
          v_bytes(packed_value_bytes(sizes.keys, sizes.head_dim)) {}

    bool bytes(int64_t* all) const {
        return checked_mul(count, q_bytes + k_bytes + v_bytes + 4 * queries + 8 * keys + 384, all);
    }
    void place(Buffer& buffer) {
        q = buffer.take<int8_t>(count * q_bytes);
        k = buffer.take<int8_t>(count * k_bytes);
        v = buffer.take<int8_t>(count * v_bytes);
        q_scale = buffer.take<float>(count * queries);
        k_scale = buffer.take<float>(count * keys);
        v_scale = buffer.take<float>(count * keys);
    }
    Keys keys_of(int64_t head) const {
        return {true,
                {},
                {},
                k + head * k_bytes,
                v + head * v_bytes,
                k_scale + head * keys,
                v_scale + head * keys};
    }
};

// Fills the heads, kTileKeys tokens of all heads of a batch element at a time.
class Packer {
  public:
    Packer(const Attention& args, const Call& call, const RowRule& k_rule, const RowRule& v_rule,
           const Heads& heads)
        : args_(args),
          call_(call),
          k_rule_(k_rule),
          v_rule_(v_rule),
          heads_(heads),
          tile_(args.sizes.head_dim),
          scaled_stride_(code_stride(args.sizes.head_dim)),
          buffer_(tile_.bytes() + Buffer::bytes_of<float>(kTileKeys * scaled_stride_)) {
        if (buffer_.empty()) return;
        tile_.place(buffer_.take<int8_t>(tile_.bytes()));
        scaled_ = buffer_.take<float>(kTileKeys * scaled_stride_);
    }
    bool empty() const { return buffer_.empty(); }

    void keys(int64_t b, int64_t tile) const {
        const int64_t first = tile * kTileKeys, count = left(args_.sizes.keys, first);
        for (int64_t h = 0; h < args_.sizes.heads; ++h) {
            const int64_t head = b * args_.sizes.heads + h, at = head * heads_.keys + first;
            for (int64_t i = count; i < kTileKeys; ++i) tile_.clear(i);
            for (int64_t i = 0; i < count; ++i)
                heads_.k_scale[at + i] = k_rule_(row_of(args_.k, b, h, first + i), tile_.row(i));
            tile_.pack_keys(call_.loops, tile, heads_.k + head * heads_.k_bytes);
            for (int64_t i = 0; i < count; ++i)
                heads_.v_scale[at + i] = v_rule_.of_value(row_of(args_.v, b, h, first + i), tile_.row(i));
            tile_.pack_values(call_.loops, tile, heads_.v + head * heads_.v_bytes);
        }
    }

    void queries(int64_t b, int64_t tile) const {
        const AttentionSizes& sizes = args_.sizes;
        const int64_t first = tile * kTileKeys, count = left(sizes.queries, first);
        const int64_t padding = scaled_stride_ - sizes.head_dim;
        for (int64_t h = 0; h < sizes.heads; ++h) {
            const int64_t at = (b * sizes.heads + h) * heads_.queries + first;
            for (int64_t i = 0; i < count; ++i)
                scaled_row(row_of(args_.q, b, h, first + i), args_.q.dtype, sizes.head_dim,
                           sizes.softmax_scale, scaled_ + i * scaled_stride_);
            for (int64_t i = 0; i < count; ++i) {
                int8_t* codes = heads_.q + (at + i) * scaled_stride_;
                heads_.q_scale[at + i] = call_.q_rule(scaled_ + i * scaled_stride_, codes);
                std::memset(codes + sizes.head_dim, 0, static_cast<size_t>(padding));
            }
        }
    }

  private:
    static int64_t left(int64_t all, int64_t first) {
        return all - first < kTileKeys ? all - first : kTileKeys;
    }

    const Attention& args_;
    const Call& call_;
    const RowRule &k_rule_, &v_rule_;
    const Heads& heads_;
    Tile tile_;
    int64_t scaled_stride_;
    Buffer buffer_;
    float* scaled_ = nullptr;
};

constexpr int64_t tiles_of(int64_t rows) {
    return round_up(rows, kTileKeys) / kTileKeys;
}

}  // namespace

Status attention(const Attention& args) {
    const AttentionSizes& sizes = args.sizes;
    Status status = check(sizes, args.q, args.mask, args.bias);
    if (status != Status::ok) return status;
    if (args.k.dtype != args.q.dtype || args.v.dtype != args.q.dtype) return Status::bad_dtype;
    if (args.k.stride[3] != 1 || args.v.stride[3] != 1 || !valid_strides(args.k) || !valid_strides(args.v))
        return Status::bad_attention;
    const int64_t all_heads = sizes.batch * sizes.heads;
    if (all_heads == 0 || sizes.queries == 0) return Status::ok;
    if (sizes.keys == 0) {
        clear_output(sizes, args.q.dtype, args.out);
        return Status::ok;
    }
    Isa isa = Isa::scalar;
    status = active_isa(&isa);
    if (status != Status::ok) return status;

    Heads heads(sizes);
    int64_t bytes = 0;
    if (!heads.bytes(&bytes)) return Status::size_overflow;
    Buffer buffer(bytes);
    if (buffer.empty()) return Status::no_memory;
    heads.place(buffer);

    const AttentionFunctions& loops = attention_functions(isa);
    const Call call = {sizes,    loops,        query_rule(sizes, args.q, isa), args.q, args.mask, args.bias,
                       args.out, args.by_token};
    const auto rule_of = [&](const Operand& x) {
        return row_rule(x, isa, sizes.mode, sizes.clip, sizes.batch, sizes.heads, sizes.keys, sizes.head_dim);
    };
    const RowRule k_rule = rule_of(args.k), v_rule = rule_of(args.v);

    std::atomic<bool> failed{false};
    const int64_t key_tiles = tiles_of(sizes.keys), tiles = key_tiles + tiles_of(sizes.queries);
    int64_t items = sizes.batch * tiles;
    // Quantizing a row costs about as much as 8 products with it.
    int64_t tasks = tasks_for(sizes, items, all_heads * (2 * sizes.keys + sizes.queries) * 4);
    parallel_for(tasks, sizes.threads, [&](int64_t task) {
        const Packer packer(args, call, k_rule, v_rule, heads);
        if (packer.empty()) {
            failed = true;
            return;
        }
        for (int64_t i = items * task / tasks; i < items * (task + 1) / tasks; ++i) {
            const int64_t b = i / tiles, tile = i % tiles;
            if (tile < key_tiles)
                packer.keys(b, tile);
            else
                packer.queries(b, tile - key_tiles);
        }
    });
    if (failed) return Status::no_memory;

    const int64_t query_blocks = (sizes.queries + kQueryBlock - 1) / kQueryBlock;
    items = all_heads * query_blocks;
    tasks = tasks_for(sizes, items, all_heads * sizes.queries * sizes.keys);
    parallel_for(tasks, sizes.threads, [&](int64_t task) {
        Worker worker(call, sizes.keys);
        if (worker.empty()) {
            failed = true;
            return;
        }
        for (int64_t i = items * task / tasks; i < items * (task + 1) / tasks; ++i) {
            const int64_t head = i / query_blocks, first = i % query_blocks * kQueryBlock;
            const int64_t last = first + kQueryBlock < sizes.queries ? first + kQueryBlock : sizes.queries;
            for (int64_t at = first; at < last; at += kQueryTile) {
                Query queries[kQueryTile];
                int64_t count = 0;
                for (; count < kQueryTile && at + count < last; ++count)
                    queries[count] = {head / sizes.heads, head % sizes.heads, at + count,
                                      limit_of(sizes, sizes.keys, at + count)};
                const int64_t row = head * sizes.queries + at;
                worker.attend(heads.keys_of(head), queries, count,
                              heads.q + row * code_stride(sizes.head_dim), heads.q_scale + row);
            }
        }
    });
    return failed ? Status::no_memory : Status::ok;
}

}  // namespace dqk
