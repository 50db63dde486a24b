// What a decode step does before its first layer and behind its head: positions, logits, the largest of them.
#include <algorithm>
#include <limits>

#include "cpu/norm.h"
#include "cpu/threads.h"
#include "dqk/api.h"
#include "dqk/element.h"
#include "dqk/shape.h"

namespace dqk {
namespace {

constexpr int64_t kChunk = 1024;  // floats on the stack
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

// As torch.argmax has it. A block's maximum first: where the largest lies within it is asked of one block.
int64_t place_of_largest(const float* x, int64_t n) {
    constexpr int kWide = 16;
    float best = -std::numeric_limits<float>::infinity();
    int64_t block = 0;
    bool has_nan = false;
    for (int64_t start = 0; start < n && !has_nan; start += kChunk) {
        const int64_t end = std::min(n, start + kChunk);
        float most[kWide];
        uint32_t nan[kWide] = {};
        std::fill(most, most + kWide, best);
        int64_t i = start;
        for (; i + kWide <= end; i += kWide)
            for (int j = 0; j < kWide; ++j) {
                const float v = x[i + j];
                most[j] = v > most[j] ? v : most[j];
                nan[j] |= v != v ? 1U : 0U;
            }
        for (; i < end; ++i) {
            most[0] = x[i] > most[0] ? x[i] : most[0];
            nan[0] |= x[i] != x[i] ? 1U : 0U;
        }
        const float largest = *std::max_element(most, most + kWide);
        for (const uint32_t one : nan) has_nan |= one != 0;
        if (largest > best || has_nan) block = start;
        best = largest;
    }
    for (int64_t i = block; i < n; ++i)
        if (has_nan ? x[i] != x[i] : x[i] == best) return i;
    return 0;  // an empty row, which is refused before
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
    const bool moves = args.x != args.y || args.bias != nullptr;
    const int32_t threads = args.rows * args.n > kAlone ? args.threads : 1;
    parallel_for(args.rows, threads, [&](int64_t m) {
        float* y = args.y + m * args.n;
        for (int64_t first = 0; moves && first < args.n; first += kChunk) {
            const int64_t count = std::min(kChunk, args.n - first);
            float x[kChunk], bias[kChunk], sum[kChunk];
            chunk.load(args.x, m * args.n + first, count, args.bias == nullptr ? y + first : x);
            if (args.bias == nullptr) continue;
            of_bias.load(args.bias, first, count, bias);
            loops.add(x, bias, count, sum);
            if (args.rounded) chunk.round(sum, count);
            std::copy(sum, sum + count, y + first);
        }
        if (args.best != nullptr) args.best[m] = place_of_largest(y, args.n);
    });
    return Status::ok;
}

}  // namespace dqk
