// LayerNorm and GELU on a CPU, and the codes of what they give, a row at a time.
#include "cpu/norm.h"

#include <atomic>
#include <initializer_list>

#include "cpu/buffer.h"
#include "cpu/quantize_row.h"
#include "cpu/threads.h"
#include "dqk/element.h"
#include "dqk/shape.h"

namespace dqk {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;  // about 10 us

int64_t tasks_for(const QuantizeRows& codes, int32_t threads) {
    const int64_t worth = codes.rows * codes.k / kElementsPerTask;
    int64_t tasks = static_cast<int64_t>(threads) * 4;
    if (threads <= 1 || worth < 2) return 1;
    if (worth < tasks) tasks = worth;
    return tasks < codes.rows ? tasks : codes.rows;
}

int32_t code_of(DType dtype) {
    return static_cast<int32_t>(dtype);
}

bool fits(int64_t rows, int64_t stride, DType dtype) {
    int64_t bytes = 0;
    return checked_mul(rows, stride, &bytes) && checked_mul(bytes, element_bytes(dtype), &bytes);
}

// A row of any float type as fp32: where it lies, or as a copy.
const float* as_floats(const RowLoops& loops, DType dtype, const void* x, int64_t k, float* copy) {
    if (dtype == DType::float32) return static_cast<const float*>(x);
    loops.widen[code_of(dtype)](x, k, copy);
    return copy;
}

const char* row_at(const void* x, int64_t m, int64_t stride, DType dtype) {
    return static_cast<const char*>(x) + m * stride * element_bytes(dtype);
}

// The codes under per_tensor, once all rows are known; under the other modes each row has them already.
Status finish(const QuantizeRows& codes, const void* y) {
    if (codes.mode != ActMode::per_tensor) return Status::ok;
    QuantizeRows args = codes;
    args.x = y;
    args.row_stride = codes.k;
    return quantize_rows(args);
}

}  // namespace

Status norm_quantize(const NormQuantize& args) {
    const QuantizeRows& codes = args.codes;
    const int64_t k = codes.k;
    QuantizeRows checked = codes;
    checked.row_stride = args.row_stride;
    const Status status = check(checked);
    if (status != Status::ok) return status;
    if (args.residual != nullptr && args.residual_stride < 0) return Status::bad_size;
    for (const DType dtype : {args.residual_dtype, args.weight_dtype, args.bias_dtype})
        if (dtype == DType::int8) return Status::bad_dtype;
    if (!fits(codes.rows, args.residual_stride, args.residual_dtype)) return Status::size_overflow;
    if (codes.rows == 0) return Status::ok;
    Isa isa = Isa::scalar;
    const Status chosen = active_isa(&isa);
    if (chosen != Status::ok) return chosen;

    const RowLoops& loops = row_loops(isa);
    const RowFunctions row = row_functions(codes.dtype, isa);
    Buffer parameters(2 * Buffer::bytes_of<float>(k));
    if (parameters.empty()) return Status::no_memory;
    const float* weight = as_floats(loops, args.weight_dtype, args.weight, k, parameters.take<float>(k));
    const float* bias = args.bias == nullptr
                            ? nullptr
                            : as_floats(loops, args.bias_dtype, args.bias, k, parameters.take<float>(k));

    std::atomic<bool> failed{false};
    const int64_t tasks = tasks_for(codes, args.threads);
    parallel_for(tasks, args.threads, [&](int64_t task) {
        Buffer buffer(3 * Buffer::bytes_of<float>(k));
        if (buffer.empty()) {
            failed = true;
            return;
        }
        float* total = buffer.take<float>(k);
        float* wide = buffer.take<float>(k);
        float* sum = buffer.take<float>(k);
        for (int64_t m = codes.rows * task / tasks; m < codes.rows * (task + 1) / tasks; ++m) {
            const float* in =
                as_floats(loops, codes.dtype, row_at(args.x, m, args.row_stride, codes.dtype), k, total);
            if (args.residual != nullptr) {
                const void* other = row_at(args.residual, m, args.residual_stride, args.residual_dtype);
                loops.add(in, as_floats(loops, args.residual_dtype, other, k, wide), k, sum);
                in = sum;
            }
            char* y = static_cast<char*>(args.y) + m * k * element_bytes(codes.dtype);
            if (codes.dtype == DType::float32) {
                loops.norm(in, k, weight, bias, args.eps, reinterpret_cast<float*>(y));
            } else {
                loops.norm(in, k, weight, bias, args.eps, total);
                loops.narrow[code_of(codes.dtype)](total, k, y);
            }
            if (codes.mode != ActMode::per_tensor) quantize_row(row, codes, m, y, row.amax_bits(y, k));
        }
    });
    if (failed) return Status::no_memory;
    return finish(codes, args.y);
}

Status gelu_quantize(const GeluQuantize& args) {
    const QuantizeRows& codes = args.codes;
    const int64_t k = codes.k;
    const Status status = check(codes);
    if (status != Status::ok || codes.rows == 0) return status;
    Isa isa = Isa::scalar;
    const Status chosen = active_isa(&isa);
    if (chosen != Status::ok) return chosen;

    const RowLoops& loops = row_loops(isa);
    const RowFunctions row = row_functions(codes.dtype, isa);
    const bool per_tensor = codes.mode == ActMode::per_tensor;
    std::atomic<bool> failed{false};
    std::atomic<uint32_t> tensor_amax{0};
    const int64_t tasks = tasks_for(codes, args.threads);
    // Under per_tensor everything is computed twice: once for the largest magnitude of all.
    for (int pass = per_tensor ? 0 : 1; pass < 2 && !failed; ++pass)
        parallel_for(tasks, args.threads, [&](int64_t task) {
            Buffer buffer(2 * Buffer::bytes_of<float>(k));
            if (buffer.empty()) {
                failed = true;
                return;
            }
            float* wide = buffer.take<float>(k);
            float* result = buffer.take<float>(k);
            uint32_t most = 0;
            for (int64_t m = codes.rows * task / tasks; m < codes.rows * (task + 1) / tasks; ++m) {
                const void* in = row_at(codes.x, m, codes.row_stride, codes.dtype);
                loops.gelu(as_floats(loops, codes.dtype, in, k, wide), k, result);
                const void* y = result;
                if (codes.dtype != DType::float32) {
                    loops.narrow[code_of(codes.dtype)](result, k, wide);
                    y = wide;
                }
                const uint32_t amax = row.amax_bits(y, k);
                most = amax > most ? amax : most;
                if (pass == 1) quantize_row(row, codes, m, y, per_tensor ? tensor_amax.load() : amax);
            }
            if (pass == 1) return;
            uint32_t before = tensor_amax.load();
            while (before < most && !tensor_amax.compare_exchange_weak(before, most)) {
            }
        });
    return failed ? Status::no_memory : Status::ok;
}

}  // namespace dqk
