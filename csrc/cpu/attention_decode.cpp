// Attention over a cache: rows that read one cache go through its keys together.
#include <atomic>
#include <cstring>

#include "cpu/attention_call.h"
#include "cpu/threads.h"

namespace dqk {
namespace {

Status check(const AttentionDecode& args) {
    const AttentionSizes& sizes = args.sizes;
    const Status status = check(sizes, args.q, {}, args.bias);
    if (status != Status::ok) return status;
    if (args.caches < 0 || (args.source == nullptr && args.caches < sizes.batch))
        return Status::bad_attention;
    if (!valid_strides(args.k) || !valid_strides(args.v)) return Status::bad_attention;
    for (int64_t r = 0; r < sizes.batch; ++r) {
        if (args.lengths[r] < 0 || args.lengths[r] > sizes.keys) return Status::bad_keys;
        if (args.source == nullptr) continue;
        const int32_t* named = args.source_per_key ? args.source + r * sizes.keys : args.source + r;
        const int64_t count = args.source_per_key ? args.lengths[r] : 1;
        for (int64_t j = 0; j < count; ++j)
            if (named[j] < 0 || named[j] >= args.caches) return Status::bad_keys;
    }
    return Status::ok;
}

// One past the last byte of a cache.
const int8_t* end_of(const Cache& cache, int64_t caches, const AttentionSizes& sizes) {
    return cache.codes + (caches - 1) * cache.stride[0] + (sizes.heads - 1) * cache.stride[1] +
           (sizes.keys - 1) * cache.stride[2] + sizes.head_dim;
}

// Rows by the cache they read, so that those of one stand together: order[start[g]] ... are group g.
struct Groups {
    int32_t *order, *start;
    int64_t count;
};

Groups group_rows(const AttentionDecode& args, Buffer* buffer) {
    const int64_t rows = args.sizes.batch;
    const bool shared = args.source != nullptr && !args.source_per_key;
    Groups groups = {buffer->take<int32_t>(rows), buffer->take<int32_t>(rows + 1), 0};
    int32_t* next = buffer->take<int32_t>(rows);         // row -> the next one of its cache
    int32_t* last = buffer->take<int32_t>(args.caches);  // cache -> its last row so far
    if (shared) std::memset(last, -1, static_cast<size_t>(args.caches) * sizeof(int32_t));
    int32_t* first = groups.order;  // filled below, once it has served as the list of first rows
    for (int32_t r = 0; r < rows; ++r) {
        next[r] = -1;
        if (shared && last[args.source[r]] >= 0)
            next[last[args.source[r]]] = r;
        else
            first[groups.count++] = r;
        if (shared) last[args.source[r]] = r;
    }
    // From the back, so that no first row is overwritten before it was read.
    int64_t at = rows;
    groups.start[groups.count] = static_cast<int32_t>(rows);
    for (int64_t g = groups.count - 1; g >= 0; --g) {
        int64_t size = 0;
        for (int32_t r = first[g]; r >= 0; r = next[r]) ++size;
        at -= size;
        groups.start[g] = static_cast<int32_t>(at);
        int64_t place = at;
        for (int32_t r = first[g]; r >= 0; r = next[r]) groups.order[place++] = r;
    }
    return groups;
}

// The memory of one task of decoding, beside its worker's.
class CacheReader {
  public:
    CacheReader(const AttentionDecode& args, const AttentionFunctions& loops, int64_t most_keys, bool packs)
        : args_(args),
          loops_(loops),
          tile_(args.sizes.head_dim),
          buffer_(2 * Buffer::bytes_of<int64_t>(most_keys) + 2 * Buffer::bytes_of<float>(most_keys) +
                  (packs ? Buffer::bytes_of<int8_t>(packed_key_bytes(most_keys, args.sizes.head_dim)) +
                               Buffer::bytes_of<int8_t>(packed_value_bytes(most_keys, args.sizes.head_dim)) +
                               Buffer::bytes_of<int8_t>(tile_.bytes())
                         : 0)) {
        if (buffer_.empty()) return;
        k_offset_ = buffer_.take<int64_t>(most_keys);
        v_offset_ = buffer_.take<int64_t>(most_keys);
        k_scale_ = buffer_.take<float>(most_keys);
        v_scale_ = buffer_.take<float>(most_keys);
        if (!packs) return;
        k_packed_ = buffer_.take<int8_t>(packed_key_bytes(most_keys, args.sizes.head_dim));
        v_packed_ = buffer_.take<int8_t>(packed_value_bytes(most_keys, args.sizes.head_dim));
        tile_.place(buffer_.take<int8_t>(tile_.bytes()));
    }
    bool empty() const { return buffer_.empty(); }

    // The first `count` keys of a row's head.
    Keys keys_of(int64_t row, int64_t head, int64_t count, bool pack) {
        const AttentionSizes& sizes = args_.sizes;
        const int32_t* each = args_.source_per_key ? args_.source + row * sizes.keys : nullptr;
        const int64_t cache = each != nullptr ? 0 : args_.source != nullptr ? args_.source[row] : row;
        Keys keys = {false,
                     rows_of(args_.k, cache, head, each, count, k_offset_),
                     rows_of(args_.v, cache, head, each, count, v_offset_),
                     k_packed_,
                     v_packed_,
                     scales_of(args_.k, cache, head, each, count, k_scale_),
                     scales_of(args_.v, cache, head, each, count, v_scale_)};
        if (!pack) return keys;
        keys.packed = true;
        for (int64_t at = 0; at * kTileKeys < count; ++at) {
            read_tile(keys.k_rows, at, count);
            tile_.pack_keys(loops_, at, k_packed_);
            read_tile(keys.v_rows, at, count);
            tile_.pack_values(loops_, at, v_packed_);
        }
        return keys;
    }

  private:
    KeyRows rows_of(const Cache& from, int64_t cache, int64_t head, const int32_t* each, int64_t count,
                    int64_t* offset) const {
        const int8_t* base = from.codes + cache * from.stride[0] + head * from.stride[1];
        const int8_t* end = end_of(from, args_.caches, args_.sizes);
        if (each == nullptr) return {base, from.stride[2], nullptr, end};
        for (int64_t j = 0; j < count; ++j) offset[j] = each[j] * from.stride[0] + j * from.stride[2];
        return {base, 0, offset, end};
    }

    const float* scales_of(const Cache& from, int64_t cache, int64_t head, const int32_t* each, int64_t count,
                           float* copy) const {
        const float* base = from.scale + cache * from.scale_stride[0] + head * from.scale_stride[1];
        if (each == nullptr && from.scale_stride[2] == 1) return base;
        for (int64_t j = 0; j < count; ++j)
            copy[j] = base[(each == nullptr ? 0 : each[j] * from.scale_stride[0]) + j * from.scale_stride[2]];
        return copy;
    }

    void read_tile(const KeyRows& rows, int64_t at, int64_t count) const {
        for (int64_t i = 0; i < kTileKeys; ++i) {
            const int64_t key = at * kTileKeys + i;
            if (key < count)
                std::memcpy(tile_.row(i), rows.row(key), static_cast<size_t>(args_.sizes.head_dim));
            else
                tile_.clear(i);
        }
    }

    const AttentionDecode& args_;
    const AttentionFunctions& loops_;
    Tile tile_;
    Buffer buffer_;
    int64_t *k_offset_ = nullptr, *v_offset_ = nullptr;
    float *k_scale_ = nullptr, *v_scale_ = nullptr;
    int8_t *k_packed_ = nullptr, *v_packed_ = nullptr;
};

}  // namespace

Status attention_decode(const AttentionDecode& args) {
    const AttentionSizes& sizes = args.sizes;
    Status status = check(args);
    if (status != Status::ok) return status;
    if (sizes.batch * sizes.heads == 0 || sizes.queries == 0) return Status::ok;
    if (sizes.keys == 0 || args.caches == 0) {
        clear_output(sizes, args.q.dtype, args.out);
        return Status::ok;
    }
    Isa isa = Isa::scalar;
    status = active_isa(&isa);
    if (status != Status::ok) return status;
    Buffer buffer(3 * Buffer::bytes_of<int32_t>(sizes.batch + 1) + Buffer::bytes_of<int32_t>(args.caches));
    if (buffer.empty()) return Status::no_memory;
    const Groups groups = group_rows(args, &buffer);

    int64_t most_keys = 0, work = 0, most_rows = 0;
    for (int64_t r = 0; r < sizes.batch; ++r) {
        most_keys = args.lengths[r] > most_keys ? args.lengths[r] : most_keys;
        work += args.lengths[r] * sizes.heads * sizes.queries;
    }
    for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t size = groups.start[g + 1] - groups.start[g];
        most_rows = size > most_rows ? size : most_rows;
    }
    const AttentionFunctions& loops = attention_functions(isa);
    const Operand none = {};
    const Call call = {sizes,    loops, query_rule(sizes, args.q, isa), args.q, none, args.bias,
                       args.out, false};

    std::atomic<bool> failed{false};
    const int64_t items = groups.count * sizes.heads, tasks = tasks_for(sizes, items, work);
    parallel_for(tasks, sizes.threads, [&](int64_t task) {
        Worker worker(call, most_keys);
        CacheReader reader(args, loops, most_keys, most_rows * sizes.queries >= kQueryTile);
        if (worker.empty() || reader.empty()) {
            failed = true;
            return;
        }
        for (int64_t i = items * task / tasks; i < items * (task + 1) / tasks; ++i) {
            const int64_t group = i / sizes.heads, head = i % sizes.heads;
            const int32_t* rows = groups.order + groups.start[group];
            const int64_t total = (groups.start[group + 1] - groups.start[group]) * sizes.queries;
            int64_t length = 0;
            for (int64_t n = 0; n * sizes.queries < total; ++n)
                length = args.lengths[rows[n]] > length ? args.lengths[rows[n]] : length;
            // Packing costs about as much as three queries save.
            const Keys keys = reader.keys_of(rows[0], head, length, total >= kQueryTile);
            for (int64_t at = 0; at < total; at += kQueryTile) {
                Query queries[kQueryTile];
                int64_t count = 0;
                for (; count < kQueryTile && at + count < total; ++count) {
                    const int64_t row = rows[(at + count) / sizes.queries],
                                  query = (at + count) % sizes.queries;
                    queries[count] = {row, head, query, limit_of(sizes, args.lengths[row], query)};
                }
                worker.attend(keys, queries, count);
            }
        }
    });
    return failed ? Status::no_memory : Status::ok;
}

}  // namespace dqk
