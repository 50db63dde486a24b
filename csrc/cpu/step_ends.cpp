// What a decode step does before its first layer and behind its head: positions, logits, the largest of them.
#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/norm.h"
#include "cpu/threads.h"
#include "cpu/top_k.h"
#include "dqk/api.h"
#include "dqk/element.h"
#include "dqk/shape.h"

namespace dqk {
namespace {

constexpr int64_t kChunk = 1024;  // floats on the stack
constexpr int64_t kTogether = 8;  // chunks of a task, some 2 us
constexpr int64_t kAlone =
    1 << 17;  // logits that one thread finishes in the time that others need to wake up

bool is_float(DType dtype) {
    return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

// rows * k elements of up to 4 bytes.
bool fits(int64_t rows, int64_t k) {
    int64_t bytes = 0;
    return checked_mul(rows, k, &bytes) && checked_mul(bytes, 4, &bytes);
}

char* at(void* base, DType dtype, int64_t i) {
    return static_cast<char*>(base) + i * element_bytes(dtype);
}
const char* at(const void* base, DType dtype, int64_t i) {
    return static_cast<const char*>(base) + i * element_bytes(dtype);
}

// Loops over a chunk of one type, and rounding to it in place.
class Chunk {
  public:
    Chunk(const RowLoops& loops, DType dtype) : loops_(loops), dtype_(dtype) {}

    void load(const void* x, int64_t first, int64_t count, float* out) const {
        loops_.widen[static_cast<int32_t>(dtype_)](at(x, dtype_, first), count, out);
    }
    void store(const float* x, int64_t count, void* out, int64_t first) const {
        loops_.narrow[static_cast<int32_t>(dtype_)](x, count, at(out, dtype_, first));
    }
    void round(float* x, int64_t count) const {
        if (dtype_ == DType::float32) return;
        uint16_t narrow[kChunk];
        store(x, count, narrow, 0);
        load(narrow, 0, count, x);
    }

  private:
    const RowLoops& loops_;
    DType dtype_;
};

// As torch.argmax has it: the first of the largest, a NaN above all. most: the largest of each chunk of x.
int64_t place_of_largest(const float* x, int64_t n, const float* most) {
    int64_t chunk = 0;
    for (int64_t c = 1; c < ceil_div(n, kChunk); ++c)
        if (is_larger(most[c], most[chunk])) chunk = c;
    const float best = most[chunk];
    int64_t i = chunk * kChunk;
    while (best != best ? x[i] == x[i] : x[i] != best) ++i;
    return i;
}

}  // namespace

Status add_position(const AddPosition& args) {
    if (!is_float(args.dtype)) return Status::bad_dtype;
    if (args.rows < 0 || args.k < 1 || args.table_rows < 0) return Status::bad_size;
    if (!fits(args.rows, args.k) || !fits(args.table_rows, args.k)) return Status::size_overflow;
    for (int64_t m = 0; m < args.rows; ++m) {
        const int64_t place = args.position[m] + args.offset;
        if (place < 0 || place >= args.table_rows) return Status::bad_id;
    }
    Isa isa = Isa::scalar;
    const Status chosen = active_isa(&isa);
    if (chosen != Status::ok) return chosen;

    const RowLoops& loops = row_loops(isa);
    const Chunk chunk(loops, args.dtype);
    for (int64_t m = 0; m < args.rows; ++m) {
        const int64_t place = args.position[m] + args.offset;
        for (int64_t first = 0; first < args.k; first += kChunk) {
            const int64_t count = std::min(kChunk, args.k - first);
            float x[kChunk], position[kChunk], sum[kChunk];
            chunk.load(args.x, m * args.k + first, count, x);
            if (args.factor != 1.0F) {
                for (int64_t i = 0; i < count; ++i) x[i] *= args.factor;
                chunk.round(x, count);
            }
            chunk.load(args.table, place * args.k + first, count, position);
            loops.add(x, position, count, sum);
            chunk.store(sum, count, args.x, m * args.k + first);
        }
    }
    return Status::ok;
}

Status finish_logits(const FinishLogits& args) {
    if (!is_float(args.dtype) || !is_float(args.bias_dtype)) return Status::bad_dtype;
    if (args.rows < 0 || args.n < 1) return Status::bad_size;
    if (!fits(args.rows, args.n)) return Status::size_overflow;
    Isa isa = Isa::scalar;
    const Status chosen = active_isa(&isa);
    if (chosen != Status::ok) return chosen;

    const RowLoops& loops = row_loops(isa);
    const Chunk chunk(loops, args.dtype), of_bias(loops, args.bias_dtype);
    const bool moves = args.x != args.y || args.bias != nullptr, finds = args.best != nullptr;
    if (!moves && !finds) return Status::ok;
    const int64_t chunks = ceil_div(args.n, kChunk), tasks = ceil_div(chunks, kTogether);
    Buffer memory(finds ? Buffer::bytes_of<float>(args.rows * chunks) : 0);
    if (memory.empty()) return Status::no_memory;
    auto* most = memory.take<float>(0);
    const int32_t threads = args.rows * args.n > kAlone ? args.threads : 1;
    parallel_for(args.rows * tasks, threads, [&](int64_t task) {
        const int64_t m = task / tasks, from = task % tasks * kTogether;
        float* y = args.y + m * args.n;
        for (int64_t c = from; c < std::min(chunks, from + kTogether); ++c) {
            const int64_t first = c * kChunk, count = std::min(kChunk, args.n - first);
            float x[kChunk], bias[kChunk], sum[kChunk];
            if (moves) chunk.load(args.x, m * args.n + first, count, args.bias == nullptr ? y + first : x);
            if (args.bias != nullptr) {
                of_bias.load(args.bias, first, count, bias);
                loops.add(x, bias, count, sum);
                if (args.rounded) chunk.round(sum, count);
                std::copy(sum, sum + count, y + first);
            }
            if (finds) most[m * chunks + c] = loops.largest(y + first, count);
        }
    });
    for (int64_t m = 0; finds && m < args.rows; ++m)
        args.best[m] = place_of_largest(args.y + m * args.n, args.n, most + m * chunks);
    return Status::ok;
}

}  // namespace dqk
