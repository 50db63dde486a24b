// Beam search behind the processed scores: the best continuations of each source, and its hypotheses.
#include <algorithm>
#include <limits>

#include "cpu/buffer.h"
#include "cpu/norm.h"
#include "cpu/threads.h"
#include "cpu/top_k.h"
#include "dqk/api.h"
#include "dqk/shape.h"

namespace dqk {
namespace {

constexpr int64_t kBlock = 512;     // scores whose largest is looked at first
constexpr int64_t kPerTask = 8192;  // scores of a task, some 2 us
constexpr int64_t kAlone =
    1 << 17;                   // scores that one thread looks through in the time that others need to wake up
constexpr float kLow = -1e9F;  // what lowers a score out of reach, as transformers has it
constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

// One source of `beam_candidates`. largest: of each block of each of its rows.
void choose(const BeamCandidates& args, int64_t source, const float* largest, Scored* all) {
    const int64_t n = args.n, whole = args.beams * n, kept = args.kept, blocks = ceil_div(n, kBlock);
    const float* x = args.scores + source * whole;
    const float* running = args.running + source * args.beams;
    const auto value = [&](int64_t i) { return x[i] + running[i / n]; };
    if (!takes_partial_sort(kept, whole)) {
        order_largest(value, whole, kept, all);
    } else {
        for (int64_t i = 0; i < kept; ++i) all[i] = {value(i), static_cast<int32_t>(i)};
        Largest best(all, kept);
        for (int64_t b = 0; b < args.beams; ++b) {
            const float more = running[b];
            // x + more rises with x, so a block's largest speaks for it; but for -inf + inf, a NaN.
            const bool speaks = more < std::numeric_limits<float>::infinity();
            for (int64_t block = 0; block < blocks; ++block) {
                if (speaks && !is_larger(largest[b * blocks + block] + more, best.least())) continue;
                const int64_t end = b * n + std::min(n, (block + 1) * kBlock);
                for (int64_t i = std::max(kept, b * n + block * kBlock); i < end; ++i)
                    best.offer(x[i] + more, i);
            }
        }
        best.sort();
    }
    for (int64_t i = 0; i < kept; ++i) {
        args.value[source * kept + i] = all[i].value;
        args.beam[source * kept + i] = all[i].index / n;
        args.token[source * kept + i] = all[i].index % n;
    }
}

// The operands of one source in `beam_extend`, and what it needs for a while.
struct Source {
    const BeamState& state;
    const BeamExtend& args;
    int64_t source = 0;
    Scored* all = nullptr;        // [beams + kept + 1]
    float* value = nullptr;       // [beams + kept]
    int64_t* before = nullptr;    // [beams, length], the running ones of before
    int64_t* done = nullptr;      // [beams, length], the finished ones of before
    int32_t* from = nullptr;      // [2, beams, length - start], where the tokens of both were taken from
    int64_t* lengths = nullptr;   // [beams]
    uint8_t* finished = nullptr;  // [beams + kept]

    bool tracks() const { return state.came_from != nullptr; }
    int64_t room() const { return state.most - state.start; }
    int64_t written() const { return args.length - state.start; }
    int64_t candidate(int64_t i) const { return source * args.kept + i; }
    template <typename T>
    T* rows(T* all_rows, int64_t width) const {
        return all_rows + source * state.beams * width;
    }

    bool ends(int64_t i) const {
        if (args.all_end) return true;
        if (args.ends != nullptr) return args.ends[candidate(i)] != 0;
        const int64_t* behind = args.end_tokens + args.end_count;
        return std::find(args.end_tokens, behind, args.token[candidate(i)]) != behind;
    }

    // The first `count` of each row of the source.
    template <typename T>
    void copy_rows(const T* all_rows, int64_t width, int64_t count, T* out) const {
        const T* from_row = all_rows + source * state.beams * width;
        for (int64_t j = 0; j < state.beams; ++j)
            std::copy(from_row + j * width, from_row + j * width + count, out + j * count);
    }

    // Those that end cannot go on, as long as there are enough others.
    void go_on() const {
        const int64_t beams = state.beams, at = args.length;
        copy_rows(state.running, state.most, at, before);
        if (tracks()) copy_rows(state.came_from, room(), written(), from);
        const auto open = [&](int64_t i) {
            const float score = args.value[candidate(i)];
            return ends(i) ? score + kLow : score;
        };
        order_largest(open, args.kept, beams, all);
        for (int64_t j = 0; j < beams; ++j) {
            const int64_t i = candidate(all[j].index), parent = args.beam[i];
            int64_t* to = rows(state.running, state.most) + j * state.most;
            std::copy(before + parent * at, before + (parent + 1) * at, to);
            to[at] = args.token[i];
            if (tracks()) put_from(parent, rows(state.came_from, room()) + j * room());
            state.scores[source * beams + j] = all[j].value;
            args.parents[source * beams + j] = source * beams + parent;
            args.tokens[source * beams + j] = args.token[i];
        }
    }

    // Where the tokens of one were taken from that goes on from running one `parent`.
    void put_from(int64_t parent, int32_t* to) const {
        std::copy(from + parent * written(), from + (parent + 1) * written(), to);
        to[written()] = static_cast<int32_t>(source * state.beams + parent);
    }

    // Puts candidates that end among the finished ones, where they are better.
    void finish() const {
        const int64_t beams = state.beams;
        float* scores = rows(state.finished_scores, 1);
        uint8_t* is_finished = rows(state.is_finished, 1);
        const bool full = std::all_of(is_finished, is_finished + beams, [](uint8_t f) { return f != 0; });
        std::copy(scores, scores + beams, value);
        std::copy(is_finished, is_finished + beams, finished);
        for (int64_t i = 0; i < args.kept; ++i) {
            // Only the best `beams` may end. Each sum is rounded: which one wins of those that must not
            // depends on it.
            const bool finishing = i < beams && ends(i);
            float score = args.value[candidate(i)] / args.divisor;
            if (args.early && full) score += kLow;
            if (state.improvable[source] == 0) score += kLow;
            if (!finishing) score += kLow;
            value[beams + i] = score;
            finished[beams + i] = finishing ? 1 : 0;
        }
        order_largest([&](int64_t i) { return value[i]; }, beams + args.kept, beams, all);
        bool stays = true;
        for (int64_t j = 0; j < beams; ++j) stays = stays && all[j].index == j;
        if (!stays) keep();
    }

    // The finished ones that `all` names: below `beams` one of before, else a candidate, which ends here.
    // Behind the end of any stands the filling, so that nothing longer is overwritten.
    void keep() const {
        const int64_t beams = state.beams, at = args.length;
        int64_t* length = rows(state.finished_lengths, 1);
        int32_t* done_from = from + beams * written();
        copy_rows(state.finished, state.most, at, done);
        std::copy(length, length + beams, lengths);
        if (tracks()) copy_rows(state.finished_from, room(), written(), done_from);
        for (int64_t j = 0; j < beams; ++j) {
            const int64_t which = all[j].index;
            const bool is_new = which >= beams;
            const int64_t i = is_new ? candidate(which - beams) : 0, row = is_new ? args.beam[i] : which;
            const int64_t* source_row = (is_new ? before : done) + row * at;
            int64_t* to = rows(state.finished, state.most) + j * state.most;
            std::copy(source_row, source_row + at, to);
            to[at] = is_new ? args.token[i] : state.filling;
            length[j] = is_new ? written() + 1 : lengths[which];
            state.finished_scores[source * beams + j] = all[j].value;
            state.is_finished[source * beams + j] = finished[which];
            if (!tracks()) continue;
            int32_t* to_from = rows(state.finished_from, room()) + j * room();
            if (is_new) {
                put_from(row, to_from);
            } else {
                std::copy(done_from + row * written(), done_from + (row + 1) * written(), to_from);
                to_from[written()] = -1;
            }
        }
    }

    // Whether the best running one could still beat the worst finished one.
    bool may_improve() const {
        const float* scores = rows(state.finished_scores, 1);
        const uint8_t* is_finished = rows(state.is_finished, 1);
        const float possible = state.scores[source * state.beams] / args.best_divisor;
        float worst = scores[0];
        for (int64_t j = 1; j < state.beams; ++j)  // as torch.min: a NaN is the least
            if (worst == worst && !(scores[j] >= worst)) worst = scores[j];
        bool may = false;
        for (int64_t j = 0; j < state.beams; ++j)
            may = may || possible > (is_finished[j] != 0 ? worst : kLow);
        return may;
    }
};

Status check(const BeamExtend& args) {
    const BeamState& state = args.state;
    int64_t count = 0;
    if (state.sources < 0 || state.beams < 1 || args.kept < state.beams || state.start < 0)
        return Status::bad_size;
    if (!checked_mul(state.sources, state.beams, &count) || count > kMaxIndex ||
        !checked_mul(count, state.most, &count) || !checked_mul(count, 64, &count) ||
        args.kept > kMaxIndex / 2)
        return Status::size_overflow;
    if (args.length < state.start || args.length >= state.most) return Status::bad_keys;
    for (int64_t i = 0; i < state.sources * args.kept; ++i)
        if (args.beam[i] < 0 || args.beam[i] >= state.beams) return Status::bad_id;
    return Status::ok;
}

}  // namespace

Status top_k(const TopK& args) {
    if (args.k < 1 || args.n < args.k) return Status::bad_size;
    if (args.n > kMaxIndex) return Status::size_overflow;
    Buffer memory((args.n + 1) * static_cast<int64_t>(sizeof(Scored)));
    if (memory.empty()) return Status::no_memory;
    auto* all = memory.take<Scored>(args.n + 1);
    order_largest([&](int64_t i) { return args.x[i]; }, args.n, args.k, all);
    for (int64_t i = 0; i < args.k; ++i) {
        args.value[i] = all[i].value;
        args.index[i] = all[i].index;
    }
    return Status::ok;
}

Status beam_candidates(const BeamCandidates& args) {
    int64_t whole = 0, count = 0, blocks = 0;
    if (args.sources < 0 || args.beams < 1 || args.n < 1 || args.kept < 1) return Status::bad_size;
    if (!checked_mul(args.beams, args.n, &whole) || whole > kMaxIndex ||
        !checked_mul(args.sources, whole, &count) || !checked_mul(count, 16, &blocks))
        return Status::size_overflow;
    if (args.kept > whole) return Status::bad_size;
    if (args.sources == 0) return Status::ok;
    Isa isa = Isa::scalar;
    const Status chosen = active_isa(&isa);
    if (chosen != Status::ok) return chosen;

    const RowLoops& loops = row_loops(isa);
    const bool by_blocks = takes_partial_sort(args.kept, whole);
    const int64_t rows = args.sources * args.beams, places = by_blocks ? args.kept + 1 : whole + 1;
    blocks = by_blocks ? ceil_div(args.n, kBlock) : 0;
    Buffer memory(Buffer::bytes_of<float>(rows * blocks) + args.sources * Buffer::bytes_of<Scored>(places));
    if (memory.empty()) return Status::no_memory;
    auto* largest = memory.take<float>(rows * blocks);
    auto* all = memory.take<Scored>(0);
    const int64_t apart = Buffer::bytes_of<Scored>(places) / static_cast<int64_t>(sizeof(Scored));
    const int32_t threads = count > kAlone ? args.threads : 1;

    if (by_blocks) {
        constexpr int64_t kTogether = kPerTask / kBlock;
        const int64_t tasks = ceil_div(blocks, kTogether);
        parallel_for(rows * tasks, threads, [&](int64_t task) {
            const int64_t row = task / tasks, first = task % tasks * kTogether;
            for (int64_t block = first; block < std::min(blocks, first + kTogether); ++block) {
                const int64_t start = block * kBlock;
                largest[row * blocks + block] =
                    loops.largest(args.scores + row * args.n + start, std::min(kBlock, args.n - start));
            }
        });
    }
    parallel_for(args.sources, threads, [&](int64_t source) {
        choose(args, source, largest + source * args.beams * blocks, all + source * apart);
    });
    return Status::ok;
}

Status ban_repeats(const BanRepeats& args) {
    if (args.rows < 0 || args.n < 1 || args.size < 1 || args.length < 0 || args.row_stride < args.length)
        return Status::bad_size;
    int64_t count = 0;
    if (!checked_mul(args.rows, args.n, &count) || !checked_mul(count, 4, &count) ||
        !checked_mul(args.rows, args.row_stride, &count) || !checked_mul(count, 8, &count))
        return Status::size_overflow;
    const int64_t same = args.size - 1;  // tokens that another one would complete
    for (int64_t r = 0; r < args.rows && same < args.length; ++r) {
        const int64_t* tokens = args.tokens + r * args.row_stride;
        const int64_t* last = tokens + args.length - same;
        for (int64_t i = 0; i + same < args.length; ++i) {
            const int64_t next = tokens[i + same];
            if (next >= 0 && next < args.n && std::equal(tokens + i, tokens + i + same, last))
                args.scores[r * args.n + next] = -std::numeric_limits<float>::infinity();
        }
    }
    return Status::ok;
}

Status beam_extend(const BeamExtend& args) {
    const Status status = check(args);
    if (status != Status::ok) return status;
    const BeamState& state = args.state;
    const int64_t both = state.beams + args.kept, tokens = state.beams * args.length;
    const int64_t from = state.came_from == nullptr ? 0 : 2 * state.beams * (args.length - state.start);
    Buffer memory(Buffer::bytes_of<Scored>(both + 1) + Buffer::bytes_of<float>(both) +
                  2 * Buffer::bytes_of<int64_t>(tokens) + Buffer::bytes_of<int32_t>(from) +
                  Buffer::bytes_of<int64_t>(state.beams) + Buffer::bytes_of<uint8_t>(both));
    if (memory.empty()) return Status::no_memory;
    Source one = {state, args};
    one.all = memory.take<Scored>(both + 1);
    one.value = memory.take<float>(both);
    one.before = memory.take<int64_t>(tokens);
    one.done = memory.take<int64_t>(tokens);
    one.from = memory.take<int32_t>(from);
    one.lengths = memory.take<int64_t>(state.beams);
    one.finished = memory.take<uint8_t>(both);

    bool improvable = false, all_end = true, all_finished = true;
    for (one.source = 0; one.source < state.sources; ++one.source) {
        one.go_on();
        one.finish();
        uint8_t& may = state.improvable[one.source];
        may = may != 0 && one.may_improve() ? 1 : 0;
        improvable = improvable || may != 0;
        for (int64_t i = 0; i < args.kept; ++i) all_end = all_end && one.ends(i);
        for (int64_t j = 0; j < state.beams; ++j)
            all_finished = all_finished && state.is_finished[one.source * state.beams + j] != 0;
    }
    *args.goes_on = improvable && !all_end && !(args.early && all_finished);
    return Status::ok;
}

}  // namespace dqk
