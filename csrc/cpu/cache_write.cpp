// New keys and values into the caches of decoding: the codes and scales that attention gives the same tokens.
#include "cpu/key_rows.h"
#include "cpu/threads.h"
#include "dqk/shape.h"

namespace dqk {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;  // about 10 us

Status check(const CacheWrite& args) {
    int64_t count = 0;
    if (args.batch < 0 || args.heads < 0 || args.tokens < 0 || args.head_dim < 1 ||
        args.head_dim > kMaxHeadDim || args.capacity > kMaxKeys || args.mode == ActMode::static_scale ||
        args.k.stride[3] != 1 || args.v.stride[3] != 1 || !valid_strides(args.k) || !valid_strides(args.v) ||
        !valid_strides(args.k_cache) || !valid_strides(args.v_cache))
        return Status::bad_attention;
    if (args.k.dtype == DType::int8 || args.v.dtype == DType::int8) return Status::bad_dtype;
    if (args.clip != 0.0f && (!(args.clip > 0.0f) || non_finite(magnitude_bits(args.clip))))
        return Status::bad_clip;
    if (!checked_mul(args.batch, args.heads, &count) || !checked_mul(count, args.tokens, &count) ||
        !checked_mul(count, args.head_dim * 4, &count))
        return Status::size_overflow;
    if (args.mode == ActMode::per_tensor && args.position != nullptr) return Status::bad_mode;
    if (args.batch > args.caches || args.tokens > args.capacity) return Status::bad_keys;
    for (int64_t r = 0; args.position != nullptr && r < args.batch; ++r)
        if (args.position[r] < 0 || args.position[r] > args.capacity - args.tokens) return Status::bad_keys;
    return Status::ok;
}

}  // namespace

Status cache_write(const CacheWrite& args) {
    Status status = check(args);
    if (status != Status::ok) return status;
    const int64_t items = args.batch * args.heads;
    if (items == 0 || args.tokens == 0) return Status::ok;
    Isa isa = Isa::scalar;
    status = active_isa(&isa);
    if (status != Status::ok) return status;
    const auto rule_of = [&](const Operand& x) {
        return row_rule(x, isa, args.mode, args.clip, args.batch, args.heads, args.tokens, args.head_dim);
    };
    const RowRule k_rule = rule_of(args.k), v_rule = rule_of(args.v);

    const int64_t worth = items * args.tokens * args.head_dim / kElementsPerTask;
    const int64_t tasks = worth < 2 ? 1 : worth < items ? worth : items;
    parallel_for(tasks, args.threads, [&](int64_t task) {
        for (int64_t i = items * task / tasks; i < items * (task + 1) / tasks; ++i) {
            const int64_t row = i / args.heads, head = i % args.heads;
            const int64_t first = args.position == nullptr ? 0 : args.position[row];
            for (int64_t t = 0; t < args.tokens; ++t) {
                const Place k = place_of(args.k_cache, row, head, first + t);
                const Place v = place_of(args.v_cache, row, head, first + t);
                *k.scale = k_rule(row_of(args.k, row, head, t), k.codes);
                *v.scale = v_rule.of_value(row_of(args.v, row, head, t), v.codes);
            }
        }
    });
    return Status::ok;
}

}  // namespace dqk
