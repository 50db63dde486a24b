// Attention over float keys and values: they are quantized and packed once per head, then the queries go by.
#include "cpu/attention.h"

#include <atomic>
#include <cstring>

#include "cpu/attention_call.h"
#include "cpu/prefetch.h"
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

// Keys and values of all heads, packed.
struct PackedHeads {
    int8_t *k, *v;
    float *k_scale, *v_scale;
    int64_t k_bytes, v_bytes, keys;

    Keys of(int64_t head) const {
        return {true,
                {},
                {},
                k + head * k_bytes,
                v + head * v_bytes,
                k_scale + head * keys,
                v_scale + head * keys};
    }
};

// The rows of one head lie a token apart, so that no hardware asks for the next one before it is read.
void ask_for_rows(const Operand& x, int64_t b, int64_t h, int64_t first, int64_t count, int64_t rows,
                  int64_t head_dim) {
    const int64_t last = first + count < rows ? first + count : rows;
    for (int64_t i = first; i < last; ++i) ask_for(row_of(x, b, h, i), head_dim * element_bytes(x.dtype));
}

// Tiles [first, last) of one head.
bool pack_tiles(const Attention& args, const AttentionFunctions& loops, const RowRule& k_rule,
                const RowRule& v_rule, const PackedHeads& heads, int64_t head, int64_t first, int64_t last) {
    const AttentionSizes& sizes = args.sizes;
    Tile tile(sizes.head_dim);
    Buffer buffer(tile.bytes());
    if (buffer.empty()) return false;
    const int64_t b = head / sizes.heads, h = head % sizes.heads;
    tile.place(buffer.take<int8_t>(tile.bytes()));
    for (int64_t at = first; at < last; ++at) {
        const int64_t key = at * kTileKeys;
        ask_for_rows(args.k, b, h, key + kTileKeys, kTileKeys, sizes.keys, sizes.head_dim);
        ask_for_rows(args.v, b, h, key + kTileKeys, kTileKeys, sizes.keys, sizes.head_dim);
        for (int64_t i = 0; i < kTileKeys; ++i) {
            if (key + i < sizes.keys)
                heads.k_scale[head * sizes.keys + key + i] =
                    k_rule(row_of(args.k, b, h, key + i), tile.row(i));
            else
                tile.clear(i);
        }
        tile.pack_keys(loops, at, heads.k + head * heads.k_bytes);
        for (int64_t i = 0; i < kTileKeys && key + i < sizes.keys; ++i)  // what is past the last stays clear
            heads.v_scale[head * sizes.keys + key + i] =
                v_rule.of_value(row_of(args.v, b, h, key + i), tile.row(i));
        tile.pack_values(loops, at, heads.v + head * heads.v_bytes);
    }
    return true;
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

    PackedHeads heads = {};
    heads.keys = sizes.keys;
    heads.k_bytes = packed_key_bytes(sizes.keys, sizes.head_dim);
    heads.v_bytes = packed_value_bytes(sizes.keys, sizes.head_dim);
    int64_t bytes = 0;
    if (!checked_mul(all_heads, heads.k_bytes + heads.v_bytes + 8 * sizes.keys + 256, &bytes))
        return Status::size_overflow;
    Buffer buffer(bytes);
    if (buffer.empty()) return Status::no_memory;
    heads.k = buffer.take<int8_t>(all_heads * heads.k_bytes);
    heads.v = buffer.take<int8_t>(all_heads * heads.v_bytes);
    heads.k_scale = buffer.take<float>(all_heads * sizes.keys);
    heads.v_scale = buffer.take<float>(all_heads * sizes.keys);

    const AttentionFunctions& loops = attention_functions(isa);
    const Call call = {sizes, loops, query_rule(sizes, args.q, isa), args.q, args.mask, args.bias, args.out};
    const auto rule_of = [&](const Operand& x) {
        return row_rule(x, isa, sizes.mode, sizes.clip, sizes.batch, sizes.heads, sizes.keys, sizes.head_dim);
    };
    const RowRule k_rule = rule_of(args.k), v_rule = rule_of(args.v);

    std::atomic<bool> failed{false};
    const int64_t tiles = round_up(sizes.keys, kTileKeys) / kTileKeys;
    const int64_t block = kKeyBlock / kTileKeys, blocks = (tiles + block - 1) / block;
    int64_t items = all_heads * blocks;
    // Quantizing a row costs about as much as 8 products with it.
    int64_t tasks = tasks_for(sizes, items, all_heads * sizes.keys * 8);
    parallel_for(tasks, sizes.threads, [&](int64_t task) {
        for (int64_t i = items * task / tasks; i < items * (task + 1) / tasks; ++i) {
            const int64_t first = i % blocks * block, last = first + block < tiles ? first + block : tiles;
            if (!pack_tiles(args, loops, k_rule, v_rule, heads, i / blocks, first, last)) failed = true;
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
                ask_for_rows(args.q, head / sizes.heads, head % sizes.heads, at + kQueryTile, kQueryTile,
                             sizes.queries, sizes.head_dim);
                for (; count < kQueryTile && at + count < last; ++count)
                    queries[count] = {head / sizes.heads, head % sizes.heads, at + count,
                                      limit_of(sizes, sizes.keys, at + count)};
                worker.attend(heads.of(head), queries, count);
            }
        }
    });
    return failed ? Status::no_memory : Status::ok;
}

}  // namespace dqk
