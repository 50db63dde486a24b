// The GEMM of a CPU: what it refuses, which loops it takes, and how the work is cut up.
//
// Two passes. The first quantizes the rows of x (if they are floats) and lays them out for the loops; the
// second goes through tiles of rows and columns. Sums are int32 and exact, so that no cut changes a result.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/gemm_loops.h"
#include "cpu/prefetch.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "dqk/api.h"
#include "dqk/element.h"
#include "dqk/format.h"
#include "dqk/rounding.h"
#include "dqk/shape.h"

namespace dqk {
namespace {

// ---- kernels ---------------------------------------------------------------------------------------------

struct Entry {
    const char* name;
    const GemmKernel& (*kernel)();
    Isa needs;
};
constexpr Entry kEntries[] = {
    {"scalar", scalar_gemm, Isa::scalar},
#if defined(__x86_64__)
    {"avx2", avx2_gemm, Isa::avx2},
    {"avx_vnni", avx_vnni_gemm, Isa::avx_vnni},
    {"avx512_vnni", avx512_vnni_gemm, Isa::avx512_vnni},
    {"amx_int8", amx_int8_gemm, Isa::amx_int8},
#endif
#if defined(__aarch64__) || defined(DQK_NEON_MODEL)
    {"dotprod", dotprod_gemm, Isa::dotprod},
#endif
#if defined(DQK_SIM) && defined(__x86_64__)  // of tests/sim/gemm_*_model.cpp
    {"model_avx_vnni", model_avx_vnni_gemm, Isa::avx2},
    {"model_avx512_vnni", model_avx512_vnni_gemm, Isa::avx2},
    {"model_amx", model_amx_gemm, Isa::avx2},
    {"model_dotprod", model_dotprod_gemm, Isa::scalar},
#endif
};
constexpr int32_t kEntryCount = static_cast<int32_t>(sizeof kEntries / sizeof kEntries[0]);

int32_t index_of(Isa isa) {
    for (int32_t i = 0; i < kEntryCount; ++i)
        if (kEntries[i].needs == isa) return i;
    return 0;  // scalar
}

// ---- refusals --------------------------------------------------------------------------------------------

bool float_type(DType dtype) {
    return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

Status check_part(const CpuGemm& args, const CpuPart& part) {
    PackedShape shape = {};
    int64_t bytes = 0;
    if (part.n < 1 || part.qweight == nullptr || part.weight_scale == nullptr) return Status::bad_cpu_part;
    if (args.group_size != 0 && part.group_mult == nullptr) return Status::bad_cpu_part;
    if (args.m > 0 && part.y == nullptr) return Status::bad_cpu_part;
    if (part.bias != nullptr && !float_type(part.bias_dtype)) return Status::bad_dtype;
    if (part.residual != nullptr && !float_type(part.residual_dtype)) return Status::bad_dtype;
    if (!packed_shape(part.n, args.k, args.bits, &shape) || !checked_mul(args.m, part.n, &bytes) ||
        !checked_mul(bytes, 4, &bytes))
        return Status::size_overflow;
    return Status::ok;
}

Status check(const CpuGemm& args) {
    if (!valid_bits(args.bits)) return Status::bad_bits;
    if (args.group_size != 0 &&
        (args.bits == 8 || (args.group_size != 32 && args.group_size != 64 && args.group_size != 128)))
        return Status::bad_group_size;
    if (args.k > kMaxGemmK) return Status::k_too_large;
    if (args.activation < Activation::none || args.activation > Activation::gelu)
        return Status::bad_activation;
    if (!float_type(args.y_dtype)) return Status::bad_dtype;
    if (args.part_count < 1 || args.part_count > kMaxCpuParts || args.parts == nullptr)
        return Status::bad_cpu_part;
    if (args.x_dtype == DType::int8) {
        int64_t bytes = 0;
        if (args.m < 0 || args.k < 1 || args.row_stride < 0) return Status::bad_size;
        if (!checked_mul(args.m, std::max(args.row_stride, args.k), &bytes)) return Status::size_overflow;
        if (args.m > 0 && args.act_scale == nullptr) return Status::bad_cpu_part;
    } else {
        QuantizeRows rows = {};
        rows.dtype = args.x_dtype;
        rows.rows = args.m;
        rows.k = args.k;
        rows.row_stride = args.row_stride;
        rows.mode = args.mode;
        rows.clip = args.clip;
        rows.act_scale = args.static_scale;
        const Status status = check(rows);
        if (status != Status::ok) return status;
    }
    for (int32_t i = 0; i < args.part_count; ++i) {
        const Status status = check_part(args, args.parts[i]);
        if (status != Status::ok) return status;
    }
    return Status::ok;
}

// ---- the rows of x ---------------------------------------------------------------------------------------

constexpr int64_t kRowChunk = 8;  // rows of x that a thread takes at a time

// Whether a code is -128. No quantizer of ours gives it, but whoever calls with codes of their own may, and
// the sums of panels (gemm_avx2.cpp) count on +-127.
bool has_lowest(const CpuGemm& args, int32_t threads) {
    if (args.x_dtype != DType::int8) return false;
    std::atomic<bool> found{false};
    parallel_for((args.m + kRowChunk - 1) / kRowChunk, threads, [&](int64_t chunk) {
        for (int64_t m = chunk * kRowChunk; m < std::min(args.m, (chunk + 1) * kRowChunk); ++m) {
            const char* row = static_cast<const char*>(args.x) + m * args.row_stride;
            if (std::memchr(row, 0x80, static_cast<size_t>(args.k)) != nullptr) found = true;
        }
    });
    return found;
}

struct Rows {
    uint8_t* prepared;
    int64_t stride;
    float* act_scale;
    int32_t* add;  // what comes on top of every sum of the row: minus the offset of the weights' codes
};

int32_t sum_of(const int8_t* q, int64_t k) {
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += q[i];
    return sum;
}

// rows.add holds the sum of the row's codes, if there is an offset.
void prepare_row(const CpuGemm& args, const GemmLoops& loops, int64_t blocks, const int8_t* q, int64_t m,
                 const Rows& rows) {
    loops.prepare(q, args.k, blocks, rows.prepared + m * rows.stride);
    rows.add[m] = loops.offset == 0 ? 0 : -loops.offset * rows.add[m];
}

QuantizeRows quantize_args(const CpuGemm& args, int64_t first, int64_t count, int8_t* q, const Rows& out) {
    QuantizeRows rows = {};
    rows.x = static_cast<const char*>(args.x) + first * args.row_stride * element_bytes(args.x_dtype);
    rows.dtype = args.x_dtype;
    rows.rows = count;
    rows.k = args.k;
    rows.row_stride = args.row_stride;
    rows.mode = args.mode;
    rows.clip = args.clip;
    rows.act_scale = args.static_scale;
    rows.q = q;
    rows.scale = out.act_scale + first;
    rows.row_sum = out.add + first;
    return rows;
}

// ---- the tiles -------------------------------------------------------------------------------------------

// How many rows of x share a panel at most, so that the part of theirs that meets it (up to 1 KiB a row)
// stays in a second-level cache, and at least, where a call has few columns for many threads. kRowGrain is
// what the loops take at a time.
constexpr int64_t kMaxRowBlock = 264, kMinRowBlock = 48, kRowGrain = 12;
// Shared among threads when one alone would take longer: waking them costs a few microseconds at best.
constexpr double kSharedNs = 8000.0;

thread_local Scratch call_scratch;    // of a call: the rows
thread_local Scratch thread_scratch;  // of a thread that takes part in it: its tile

struct Tile {
    const CpuGemm& args;
    const GemmKernel& kernel;
    const GemmLoops& loops;
    const Rows& rows;
    int64_t blocks, groups;

    // Columns n0 .. n1 of rows m0 .. m1. Without memory for its sums it reports that and does nothing.
    bool run(const CpuPart& part, int64_t m0, int64_t m1, int64_t n0, int64_t n1) const {
        const int64_t acc_bytes = (m1 - m0) * kGemmColumns * static_cast<int64_t>(sizeof(int32_t));
        const int64_t words =
            kGemmColumns * gemm_words(blocks, args.group_size) * static_cast<int64_t>(sizeof(int32_t));
        uint8_t* memory = thread_scratch.get(acc_bytes + kGemmScratchBytes + words);
        if (memory == nullptr) return false;
        auto* acc = reinterpret_cast<int32_t*>(memory);
        const GemmWeights weights = {
            part.qweight,   blocks * block_bytes(args.bits), blocks, part.n, part.group_mult, groups,
            args.group_size};
        for (int64_t n = n0; n < n1; n += kGemmColumns) {
            const int64_t count = std::min(kGemmColumns, n1 - n);
            ask_for_columns(part, n, count);
            ask_for_output(part, m0, std::min(m1, m0 + kRowsAhead), n, count);
            loops.sums(rows.prepared + m0 * rows.stride, rows.stride, m1 - m0, weights, n, count, acc,
                       memory + acc_bytes);
            float bias[kGemmColumns];
            if (part.bias != nullptr)
                kernel.widen(static_cast<const char*>(part.bias) + n * element_bytes(part.bias_dtype),
                             part.bias_dtype, count, bias);
            finish(part, m0, m1 - m0, n, count, part.bias == nullptr ? nullptr : bias, acc);
        }
        return true;
    }

    // What the epilogue reads of each column: in a large matrix it was last read a token ago, and a miss of
    // every tile, asked for after its sums, costs as much as they do.
    void ask_for_columns(const CpuPart& part, int64_t n, int64_t count) const {
        if (!part.tensor_scale) ask_for(part.weight_scale + n, count * 4);
        if (part.bias == nullptr) return;
        const int64_t bytes = element_bytes(part.bias_dtype);
        ask_for(static_cast<const char*>(part.bias) + n * bytes, count * bytes);
    }

    // Where rows of the result go: in a wide one each is a page further, which nothing runs ahead of.
    void ask_for_output(const CpuPart& part, int64_t first, int64_t last, int64_t n, int64_t count) const {
        const int64_t bytes = element_bytes(args.y_dtype);
        for (int64_t m = first; m < last; ++m)
            ask_for(static_cast<const char*>(part.y) + (m * part.n + n) * bytes, count * bytes);
    }

    void finish(const CpuPart& part, int64_t m, int64_t count_m, int64_t n, int64_t count, const float* bias,
                const int32_t* acc) const {
        GemmEpilogue tile = {};
        tile.rows = count_m;
        tile.count = count;
        tile.acc = acc;
        tile.add = rows.add + m;
        tile.act_scale = rows.act_scale + m;
        tile.weight_scale = part.tensor_scale ? part.weight_scale : part.weight_scale + n;
        tile.tensor_scale = part.tensor_scale;
        tile.bias = bias;
        if (part.residual != nullptr)
            tile.residual = static_cast<const char*>(part.residual) +
                            (m * part.n + n) * element_bytes(part.residual_dtype);
        tile.residual_dtype = part.residual_dtype;
        tile.activation = args.activation;
        tile.y = static_cast<char*>(part.y) + (m * part.n + n) * element_bytes(args.y_dtype);
        tile.y_dtype = args.y_dtype;
        tile.stride = part.n;
        kernel.epilogue(tile);
    }
};

// Rows of x that a task takes, of `pieces` of columns.
int64_t row_block_of(int64_t m, int64_t pieces, int32_t threads) {
    const int64_t wanted =
        (4 * static_cast<int64_t>(threads) + pieces - 1) / pieces;  // tasks for every thread
    const int64_t blocks =
        std::max((m + kMaxRowBlock - 1) / kMaxRowBlock, std::min(wanted, m / kMinRowBlock));
    return std::min(m, ((m + blocks - 1) / blocks + kRowGrain - 1) / kRowGrain * kRowGrain);
}

// What one thread would need, roughly: the weights at 20 bytes a nanosecond, or the products at 40.
double alone_ns(const CpuGemm& args, int64_t columns) {
    const double codes = static_cast<double>(columns) * static_cast<double>(args.k);
    return std::max(codes * args.bits / 8 / 20, codes * static_cast<double>(args.m) / 40);
}

}  // namespace

bool worth_sharing(const CpuGemm& args) {
    int64_t columns = 0;
    for (int32_t i = 0; i < args.part_count; ++i) columns += args.parts[i].n;
    return alone_ns(args, columns) > kSharedNs;
}

const char* gemm_kernel_name(int32_t index) {
    return index >= 0 && index < kEntryCount ? kEntries[index].name : nullptr;
}

Status active_gemm_kernel(int32_t* index) {
    Isa isa = Isa::scalar;
    const Status status = active_isa(&isa);
    if (status == Status::ok) *index = index_of(isa);
    return status;
}

Status find_gemm_kernel(int32_t asked, const GemmKernel** kernel) {
    int32_t index = asked - 1;
    if (asked == 0) {
        const Status status = active_gemm_kernel(&index);
        if (status != Status::ok) return status;
    } else if (asked < 0 || asked > kEntryCount || !isa_supported(kEntries[index].needs)) {
        return Status::bad_kernel;
    }
    *kernel = &kEntries[index].kernel();
    return Status::ok;
}

Status cpu_gemm(const CpuGemm& args) {
    const GemmKernel* kernel = nullptr;
    Status status = check(args);
    if (status == Status::ok) status = find_gemm_kernel(args.kernel, &kernel);
    if (status != Status::ok || args.m == 0) return status;

    const int32_t format = gemm_format(args.bits, args.four_level, args.group_size);
    const int64_t blocks = (args.k + kBlockK - 1) / kBlockK;
    const int64_t groups = args.group_size == 0 ? 0 : (args.k + args.group_size - 1) / args.group_size;
    const bool floats = args.x_dtype != DType::int8;
    const bool together =
        floats && args.mode == ActMode::per_tensor;  // one amax: quantized as a whole, first

    int64_t columns = 0;
    for (int32_t i = 0; i < args.part_count; ++i) columns += args.parts[i].n;
    const int32_t threads = worth_sharing(args) ? args.threads : 1;
    const GemmLoops& many = kernel->many[format];
    const GemmLoops& loops = args.m == 1                                            ? kernel->one[format]
                             : args.m < many.from_rows || has_lowest(args, threads) ? kernel->few[format]
                                                                                    : many;

    Rows rows = {};
    rows.stride = loops.row_bytes(blocks);
    int64_t prepared_bytes = 0, code_bytes = 0;
    const int64_t k_bytes = (args.k + 63) / 64 * 64;
    if (!checked_mul(args.m, rows.stride + 8, &prepared_bytes) || !checked_mul(args.m, k_bytes, &code_bytes))
        return Status::size_overflow;
    uint8_t* memory = call_scratch.get(prepared_bytes + (together ? code_bytes : 0) + 192);
    if (memory == nullptr) return Status::out_of_memory;
    rows.prepared = memory;
    rows.act_scale = reinterpret_cast<float*>(memory + args.m * rows.stride);
    rows.add = reinterpret_cast<int32_t*>(rows.act_scale + args.m);

    if (together) {
        auto* codes = reinterpret_cast<int8_t*>(memory + (prepared_bytes + 63) / 64 * 64);
        status = quantize_rows(quantize_args(args, 0, args.m, codes, rows));
        for (int64_t m = 0; status == Status::ok && m < args.m; ++m)
            prepare_row(args, loops, blocks, codes + m * args.k, m, rows);
    } else {
        std::atomic<Status> worst{Status::ok};
        parallel_for((args.m + kRowChunk - 1) / kRowChunk, threads, [&](int64_t chunk) {
            auto* codes = reinterpret_cast<int8_t*>(thread_scratch.get(k_bytes));
            if (codes == nullptr) {
                worst = Status::out_of_memory;
                return;
            }
            for (int64_t m = chunk * kRowChunk; m < std::min(args.m, (chunk + 1) * kRowChunk); ++m) {
                const int8_t* q = codes;
                if (floats) {
                    const Status done = quantize_rows(quantize_args(args, m, 1, codes, rows));
                    if (done != Status::ok) {
                        worst = done;
                        continue;
                    }
                } else {
                    q = static_cast<const int8_t*>(args.x) + m * args.row_stride;
                    rows.act_scale[m] = args.act_scale[m];
                    if (loops.offset != 0) rows.add[m] = sum_of(q, args.k);
                }
                prepare_row(args, loops, blocks, q, m, rows);
            }
        });
        status = worst;
    }

    if (status == Status::ok) {
        const Tile tile = {args, *kernel, loops, rows, blocks, groups};
        // One row: a few pieces per thread. More: as many columns as the sums of a tile have.
        int64_t width = kGemmColumns;
        if (args.m == 1) width = std::max<int64_t>(1, columns / kGemmColumns / (4 * threads)) * kGemmColumns;
        int64_t pieces[kMaxCpuParts] = {}, all = 0;
        for (int32_t i = 0; i < args.part_count; ++i)
            all += pieces[i] = (args.parts[i].n + width - 1) / width;
        const int64_t row_block = row_block_of(args.m, all, threads);
        const int64_t row_blocks = (args.m + row_block - 1) / row_block;
        std::atomic<bool> starved{false};
        parallel_for(row_blocks * all, threads, [&](int64_t index) {
            const int64_t m0 = index / all * row_block;
            int64_t piece = index % all;
            const CpuPart* part = args.parts;
            for (const int64_t* count = pieces; piece >= *count; ++count, ++part) piece -= *count;
            const int64_t n0 = piece * width;
            if (!tile.run(*part, m0, std::min(args.m, m0 + row_block), n0, std::min(part->n, n0 + width)))
                starved = true;
        });
        if (starved) status = Status::out_of_memory;
    }
    call_scratch.trim();
    return status;
}

}  // namespace dqk
