// Every primitive of cuda/primitives.cuh beside its model of sim/models.h, on random registers. Exit code 0:
// no bit differs. benchmarks/gpu_lane.py builds and runs this.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cuda/primitives.cuh"
#include "sim/models.h"

namespace {

using namespace dqk;

constexpr int32_t kRounds = 64, kLanes = sim::kLanes, kCopies = 17;
constexpr uint32_t kAll = 0xFFFFFFFFu;

// ---- kernels: one warp unless said otherwise, registers laid out [round][lane][register] ------------------

__global__ void mma(const uint32_t* a, const uint32_t* b, int32_t* c) {
    for (int32_t round = 0; round < kRounds; ++round) {
        const int32_t at = round * kLanes + static_cast<int32_t>(threadIdx.x);
        uint32_t my_a[4], my_b[2];
        int32_t my_c[4];
        for (int32_t i = 0; i < 4; ++i) my_a[i] = a[4 * at + i];
        for (int32_t i = 0; i < 2; ++i) my_b[i] = b[2 * at + i];
        for (int32_t i = 0; i < 4; ++i) my_c[i] = c[4 * at + i];
        mma_m16n8k32(my_c, my_a, my_b);
        for (int32_t i = 0; i < 4; ++i) c[4 * at + i] = my_c[i];
    }
}

// Rows in an order of their own, so that a mixed-up address shows.
__global__ void ldmatrix(const uint32_t* x, const int32_t* rows, uint32_t* out) {
    DQK_SHARED(uint32_t, tile, kLanes * 4);
    for (int32_t round = 0; round < kRounds; ++round) {
        const int32_t at = round * kLanes + static_cast<int32_t>(threadIdx.x);
        for (int32_t i = 0; i < 4; ++i) tile[4 * threadIdx.x + i] = x[4 * at + i];
        __syncwarp();
        uint32_t r[4];
        ldmatrix_x4(r, tile + 4 * rows[at]);
        for (int32_t i = 0; i < 4; ++i) out[4 * at + i] = r[i];
        __syncwarp();
    }
}

__global__ void dot(const uint32_t* a, const uint32_t* b, int32_t* c) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kRounds * kLanes; i += kLanes)
        c[i] = dot4(a[i], b[i], c[i]);
}

__global__ void words(const uint32_t* a, const uint32_t* b, uint32_t* permuted, uint32_t* counted) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kRounds * kLanes; i += kLanes) {
        permuted[i] = permute_bytes(a[i], b[i], (a[i] ^ b[i] >> 7) & 0x7777u);
        counted[i] = static_cast<uint32_t>(count_bits(a[i]));
    }
}

__global__ void powers(const float* x, float* y, int32_t count) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kLanes) y[i] = exp2_approx(x[i]);
}

__global__ void loads(const uint32_t* x, uint32_t* out16, uint32_t* out8) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kRounds * kLanes; i += kLanes) {
        const uint4 v = load_weights16(x + 4 * i);
        const uint2 w = load_weights8(x + 2 * i);
        out16[4 * i] = v.x, out16[4 * i + 1] = v.y, out16[4 * i + 2] = v.z, out16[4 * i + 3] = v.w;
        out8[2 * i] = w.x, out8[2 * i + 1] = w.y;
    }
}

__global__ void shared_loads(const uint32_t* x, uint32_t* out16, uint32_t* out8) {
    DQK_SHARED(uint32_t, tile, 8 * kLanes);
    const int32_t lane = static_cast<int32_t>(threadIdx.x);
    for (int32_t round = 0; round < kRounds; ++round) {
        const int32_t at = 4 * (round * kLanes + lane);
        for (int32_t i = 0; i < 4; ++i) tile[4 * kLanes + 4 * lane + i] = x[at + i];
        __syncwarp();
        // Another lane's words, from a base in the middle: offsets are of both signs.
        const SharedBytes base = shared_bytes(tile + 6 * kLanes);
        const int32_t other = 16 * (kLanes - 1 - lane) - 8 * kLanes;
        const uint4 v = load_shared16(base, other);
        const uint2 w = load_shared8(base, other + 8);
        out16[at] = v.x, out16[at + 1] = v.y, out16[at + 2] = v.z, out16[at + 3] = v.w;
        out8[at / 2] = w.x, out8[at / 2 + 1] = w.y;
        __syncwarp();
    }
}

// kCopies threads, thread i copies i bytes, in two groups of which the older is waited for first.
__global__ void copies(const uint32_t* x, uint32_t* out) {
    DQK_SHARED(uint32_t, tile, 2 * kCopies * 4);
    const int32_t lane = static_cast<int32_t>(threadIdx.x);
    uint32_t* first = tile + 4 * lane;
    uint32_t* second = tile + 4 * (kCopies + lane);
    for (int32_t i = 0; i < 4; ++i) first[i] = second[i] = 0xA5A5A5A5u;
    copy_async16(first, x + 4 * lane, lane);
    copy_async_commit();
    copy_async16(second, x + 4 * (kCopies + lane), 16 - lane);
    copy_async_commit();
    copy_async_wait<1>();
    for (int32_t i = 0; i < 4; ++i) out[4 * lane + i] = first[i];
    copy_async_wait<0>();
    for (int32_t i = 0; i < 4; ++i) out[4 * (kCopies + lane) + i] = second[i];
}

// out: [4 kinds][6 widths][32 operands][32 lanes]
__global__ void shuffles(const uint32_t* x, uint32_t* out) {
    const int32_t lane = static_cast<int32_t>(threadIdx.x);
    const uint32_t v = x[lane];
    for (int32_t log = 0; log < 6; ++log)
        for (int32_t operand = 0; operand < kLanes; ++operand) {
            const int32_t width = 1 << log, at = (log * kLanes + operand) * kLanes + lane;
            const int32_t kind = 6 * kLanes * kLanes;
            out[at] = __shfl_sync(kAll, v, operand, width);
            out[at + kind] = __shfl_up_sync(kAll, v, static_cast<uint32_t>(operand), width);
            out[at + 2 * kind] = __shfl_down_sync(kAll, v, static_cast<uint32_t>(operand), width);
            out[at + 3 * kind] = __shfl_xor_sync(kAll, v, operand, width);
        }
}

__global__ void votes(const uint32_t* x, uint32_t* out) {
    for (int32_t round = 0; round < kRounds; ++round) {
        const int32_t at = round * kLanes + static_cast<int32_t>(threadIdx.x);
        const int32_t predicate = x[at] % 5 < 2;
        out[3 * at] = __ballot_sync(kAll, predicate);
        out[3 * at + 1] = static_cast<uint32_t>(__any_sync(kAll, x[at] % 64 == 0));
        out[3 * at + 2] = static_cast<uint32_t>(__all_sync(kAll, x[at] % 64 != 0));
    }
}

// One thread: the sequence of counts. Many blocks: the sum, and how often each count was seen.
__global__ void counts(uint32_t* counter, uint32_t last, uint32_t* seen) {
    for (int32_t i = 0; i < kRounds; ++i) seen[i] = arrive(counter, last);
}
__global__ void arrivals(uint32_t* counter, int32_t* seen, int32_t* sum) {
    if (threadIdx.x == 0) atomic_add(seen + arrive(counter, gridDim.x - 1), 1);
    atomic_add(sum, static_cast<int32_t>(threadIdx.x) - 3);
}

// The last block adds up what all blocks wrote, read past its L1.
__global__ void last_block(int32_t* parts, uint32_t* counter, int32_t* total) {
    DQK_SHARED(uint32_t, order, 1);
    DQK_DYNAMIC_SHARED(bytes);
    wait_for_producer();
    parts[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int32_t>(blockIdx.x * threadIdx.x);
    fence();
    __syncthreads();
    if (threadIdx.x == 0) order[0] = arrive(counter, gridDim.x - 1);
    __syncthreads();
    release_dependents();
    if (order[0] != gridDim.x - 1) return;
    fence();
    auto* sums = reinterpret_cast<int32_t*>(bytes);
    sums[threadIdx.x] = 0;
    for (uint32_t block = 0; block < gridDim.x; ++block)
        sums[threadIdx.x] += load_fresh(parts + block * blockDim.x + threadIdx.x);
    __syncthreads();
    if (threadIdx.x == 0) {
        int32_t sum = 0;
        for (uint32_t i = 0; i < blockDim.x; ++i) sum += sums[i];
        *total = sum;
    }
}

// ---- comparing --------------------------------------------------------------------------------------------

int failures = 0;

void demand(bool holds, const char* what, const char* detail) {
    if (!holds) {
        std::printf("FAILED %s: %s\n", what, detail);
        ++failures;
    }
}
void demand(cudaError_t error, const char* what) {
    demand(error == cudaSuccess, what, cudaGetErrorString(error));
}
void demand(Status status, const char* what) {
    demand(status == Status::ok, what, sentence(status));
}

// Memory that both sides read. Host side first: `at` is valid whenever no kernel runs.
template <class T>
struct Array {
    explicit Array(size_t count) : size(count) {
        demand(cudaMallocManaged(&at, count * sizeof(T)), "cudaMallocManaged");
        if (at == nullptr) std::exit(1);
        for (size_t i = 0; i < count; ++i) at[i] = static_cast<T>(0);
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() { cudaFree(at); }
    std::vector<T> copy() const { return std::vector<T>(at, at + size); }
    T* at = nullptr;
    size_t size;
};

std::mt19937 random_words(1);

template <class T>
void fill(const Array<T>& array) {
    for (size_t i = 0; i < array.size; ++i) array.at[i] = static_cast<T>(random_words());
}

template <class T>
void same(const char* what, const T* got, const std::vector<T>& expected) {
    size_t wrong = 0, first = 0;
    for (size_t i = expected.size(); i-- > 0;)
        if (got[i] != expected[i]) ++wrong, first = i;
    if (wrong != 0) {
        std::printf("FAILED %s: %zu of %zu differ, first at %zu: got %08" PRIx32 ", the model says %08" PRIx32
                    "\n",
                    what, wrong, expected.size(), first, static_cast<uint32_t>(got[first]),
                    static_cast<uint32_t>(expected[first]));
        ++failures;
    } else {
        std::printf("ok %s: %zu values\n", what, expected.size());
    }
}

template <class... P>
void run(const char* what, void (*kernel)(P...), uint32_t blocks, uint32_t threads,
         typename Same<P>::type... args) {
    Launch shape;
    shape.grid_x = blocks;
    shape.threads = threads;
    shape.shared_bytes = 1024;
    demand(launch<P...>(kernel, shape, args...), what);
    demand(cudaDeviceSynchronize(), what);
}

// ---- checks -----------------------------------------------------------------------------------------------

void check_mma() {
    Array<uint32_t> a(kRounds * kLanes * 4), b(kRounds * kLanes * 2);
    Array<int32_t> c(kRounds * kLanes * 4);
    fill(a), fill(b), fill(c);
    for (int32_t i = 0; i < kLanes * 4; ++i) a.at[i] = 0x80808080u;  // -128 * -128, 32 times
    for (int32_t i = 0; i < kLanes * 2; ++i) b.at[i] = 0x80808080u;
    std::vector<int32_t> expected = c.copy();
    for (int32_t round = 0; round < kRounds; ++round)
        sim::mma_m16n8k32_model(reinterpret_cast<int32_t (*)[4]>(&expected[round * kLanes * 4]),
                                reinterpret_cast<const uint32_t (*)[4]>(a.at + round * kLanes * 4),
                                reinterpret_cast<const uint32_t (*)[2]>(b.at + round * kLanes * 2));
    run("mma_m16n8k32", mma, 1, kLanes, a.at, b.at, c.at);
    same("mma_m16n8k32", c.at, expected);
}

void check_ldmatrix() {
    Array<uint32_t> x(kRounds * kLanes * 4), out(kRounds * kLanes * 4);
    Array<int32_t> rows(kRounds * kLanes);
    fill(x);
    std::vector<uint32_t> expected(out.size);
    for (int32_t round = 0; round < kRounds; ++round) {
        const void* pointers[kLanes];
        for (int32_t lane = 0; lane < kLanes; ++lane) {
            const auto row = static_cast<int32_t>(random_words() % kLanes);
            rows.at[round * kLanes + lane] = row;
            pointers[lane] = x.at + (round * kLanes + row) * 4;
        }
        sim::ldmatrix_x4_model(reinterpret_cast<uint32_t (*)[4]>(&expected[round * kLanes * 4]), pointers);
    }
    run("ldmatrix_x4", ldmatrix, 1, kLanes, x.at, rows.at, out.at);
    same("ldmatrix_x4", out.at, expected);
}

void check_dot4() {
    Array<uint32_t> a(kRounds * kLanes), b(kRounds * kLanes);
    Array<int32_t> c(kRounds * kLanes);
    fill(a), fill(b), fill(c);
    a.at[0] = b.at[0] = 0x80808080u;
    std::vector<int32_t> expected = c.copy();
    for (size_t i = 0; i < expected.size(); ++i) expected[i] = sim::dot4_model(a.at[i], b.at[i], expected[i]);
    run("dot4", dot, 1, kLanes, a.at, b.at, c.at);
    same("dot4", c.at, expected);
}

void check_words() {
    Array<uint32_t> a(kRounds * kLanes), b(kRounds * kLanes), permuted(kRounds * kLanes),
        counted(kRounds * kLanes);
    fill(a), fill(b);
    a.at[0] = 0, a.at[1] = 0xFFFFFFFFu;
    std::vector<uint32_t> bytes(a.size), bits(a.size);
    for (size_t i = 0; i < a.size; ++i) {
        bytes[i] = sim::permute_bytes_model(a.at[i], b.at[i], (a.at[i] ^ b.at[i] >> 7) & 0x7777u);
        bits[i] = static_cast<uint32_t>(sim::count_bits_model(a.at[i]));
    }
    run("words", words, 1, kLanes, a.at, b.at, permuted.at, counted.at);
    same("permute_bytes", permuted.at, bytes);
    same("count_bits", counted.at, bits);
}

// Not a comparison of bits: the model is exact, and the instruction may err by 2^-22.
void check_exp2() {
    constexpr int32_t kSteps = 1 << 16;
    Array<float> x(kSteps + 3), y(kSteps + 3);
    for (int32_t i = 0; i < kSteps; ++i)
        x.at[i] = -24.0f * static_cast<float>(i) / kSteps - 1e-6f * (random_words() % 64);
    x.at[kSteps] = -std::numeric_limits<float>::infinity();
    x.at[kSteps + 1] = -200.0f;
    x.at[kSteps + 2] = 0.0f;
    run("exp2_approx", powers, 1, kLanes, x.at, y.at, kSteps + 3);
    double worst = 0.0;
    for (int32_t i = 0; i < kSteps; ++i) {
        const double truth = std::exp2(static_cast<double>(x.at[i]));
        const double error = std::fabs(y.at[i] - truth) / truth;
        worst = error > worst ? error : worst;
    }
    std::printf("exp2_approx errs by up to 2^%.2f of the result\n", std::log2(worst + 1e-12));
    demand(worst <= std::ldexp(1.0, -22), "exp2_approx", "a relative error above 2^-22");
    demand(y.at[kSteps] == 0.0f && y.at[kSteps + 1] == 0.0f && y.at[kSteps + 2] == 1.0f, "exp2_approx",
           "-inf and -200 give 0, and 0 gives 1");
}

void check_loads() {
    Array<uint32_t> x(kRounds * kLanes * 4), out16(kRounds * kLanes * 4), out8(kRounds * kLanes * 2);
    fill(x);
    run("loads", loads, 1, kLanes, x.at, out16.at, out8.at);
    same("load_weights16", out16.at, x.copy());
    same("load_weights8", out8.at, std::vector<uint32_t>(x.at, x.at + out8.size));
}

void check_shared_loads() {
    Array<uint32_t> x(kRounds * kLanes * 4), out16(kRounds * kLanes * 4), out8(kRounds * kLanes * 2);
    fill(x);
    std::vector<uint32_t> expected16(out16.size), expected8(out8.size);
    for (int32_t i = 0; i < kRounds * kLanes; ++i) {
        const uint32_t* words = x.at + 4 * (i / kLanes * kLanes + kLanes - 1 - i % kLanes);
        for (int32_t j = 0; j < 4; ++j) expected16[4 * i + j] = words[j];
        for (int32_t j = 0; j < 2; ++j) expected8[2 * i + j] = words[2 + j];
    }
    run("shared_loads", shared_loads, 1, kLanes, x.at, out16.at, out8.at);
    same("load_shared16", out16.at, expected16);
    same("load_shared8", out8.at, expected8);
}

void check_copies() {
    Array<uint32_t> x(2 * kCopies * 4), out(2 * kCopies * 4);
    fill(x);
    std::vector<uint32_t> expected(out.size);
    for (int32_t i = 0; i < kCopies; ++i) {
        sim::copy_async16_model(&expected[4 * i], x.at + 4 * i, i);
        sim::copy_async16_model(&expected[4 * (kCopies + i)], x.at + 4 * (kCopies + i), 16 - i);
    }
    run("copy_async16", copies, 1, kCopies, x.at, out.at);
    same("copy_async16", out.at, expected);
}

void check_shuffles() {
    Array<uint32_t> x(kLanes), out(4 * 6 * kLanes * kLanes);
    fill(x);
    const sim::Shuffle kinds[] = {sim::Shuffle::idx, sim::Shuffle::up, sim::Shuffle::down,
                                  sim::Shuffle::exclusive_or};
    std::vector<uint32_t> expected;
    for (const sim::Shuffle kind : kinds)
        for (int32_t log = 0; log < 6; ++log)
            for (int32_t operand = 0; operand < kLanes; ++operand)
                for (int32_t lane = 0; lane < kLanes; ++lane)
                    expected.push_back(x.at[sim::shuffle_source(kind, lane, operand, 1 << log)]);
    run("shuffles", shuffles, 1, kLanes, x.at, out.at);
    same("shuffles", out.at, expected);
}

void check_votes() {
    Array<uint32_t> x(kRounds * kLanes), out(kRounds * kLanes * 3);
    fill(x);
    std::vector<uint32_t> expected;
    for (int32_t round = 0; round < kRounds; ++round) {
        bool few[kLanes], none[kLanes];
        for (int32_t lane = 0; lane < kLanes; ++lane) {
            few[lane] = x.at[round * kLanes + lane] % 5 < 2;
            none[lane] = x.at[round * kLanes + lane] % 64 == 0;
        }
        const uint32_t zeros = sim::ballot_model(none, kAll);
        for (int32_t lane = 0; lane < kLanes; ++lane) {
            expected.push_back(sim::ballot_model(few, kAll));
            expected.push_back(zeros != 0);
            expected.push_back(zeros == 0);
        }
    }
    run("votes", votes, 1, kLanes, x.at, out.at);
    same("votes", out.at, expected);
}

void check_counters() {
    constexpr int32_t kBlocks = 300, kThreads = 64;
    constexpr uint32_t kLast = 6;
    Array<uint32_t> counter(1), seen(kRounds);
    std::vector<uint32_t> expected(kRounds);
    counter.at[0] = 9;  // beyond the last: starts again
    for (uint32_t i = 0, count = 9; i < kRounds; ++i, count = sim::increment_model(count, kLast))
        expected[i] = count;
    run("arrive", counts, 1, 1, counter.at, kLast, seen.at);
    same("arrive", seen.at, expected);

    Array<int32_t> times(kBlocks), sum(1);
    counter.at[0] = 0;
    run("arrive from many blocks", arrivals, kBlocks, kThreads, counter.at, times.at, sum.at);
    same("arrive from many blocks", times.at, std::vector<int32_t>(kBlocks, 1));
    same("atomic_add", sum.at,
         std::vector<int32_t>(1, kBlocks * (kThreads * (kThreads - 1) / 2 - 3 * kThreads)));
    same("the counter starts again", counter.at, std::vector<uint32_t>(1, 0));

    Array<int32_t> parts(kBlocks * kThreads), total(1);
    for (int32_t round = 0; round < 20; ++round) {  // the counter needs no reset
        for (size_t i = 0; i < parts.size; ++i) parts.at[i] = -1;
        run("last block", last_block, kBlocks, kThreads, parts.at, counter.at, total.at);
        const int32_t expected_total = kBlocks * (kBlocks - 1) / 2 * (kThreads * (kThreads - 1) / 2);
        demand(total.at[0] == expected_total, "last block", "a part was not seen");
    }
}

void check_refusals() {
    Array<uint32_t> x(4);
    Launch shape;
    shape.threads = 32;
    shape.shared_bytes = kMaxSharedBytes + 1;
    demand(launch(counts, shape, x.at, 1u, x.at) == Status::cuda_shared_memory, "refusal", "too much shared");
    shape.shared_bytes = 0;
    shape.grid_x = 0;
    demand(launch(counts, shape, x.at, 1u, x.at) == Status::cuda_failed, "refusal", "no blocks");
    shape.grid_x = 1;
    shape.threads = 1025;
    demand(launch(counts, shape, x.at, 1u, x.at) == Status::cuda_failed, "refusal", "too many threads");
    demand(cudaGetLastError(), "a refused launch leaves no error behind");
}

// Launched before its producer has ended, a kernel that waits still sees all of its writes.
void check_overlap() {
    int device = 0, major = 0;
    demand(cudaGetDevice(&device), "cudaGetDevice");
    demand(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
    if (major < 9) {
        std::printf("not run, overlap: this card has compute capability %d.x\n", major);
        return;
    }
    constexpr int32_t kBlocks = 300, kThreads = 64;
    Array<uint32_t> counter(1);
    Array<int32_t> parts(kBlocks * kThreads), total(1);
    Launch shape;
    shape.grid_x = kBlocks;
    shape.threads = kThreads;
    shape.shared_bytes = 1024;
    shape.overlap = true;
    for (int32_t i = 0; i < 50; ++i)
        demand(launch(last_block, shape, parts.at, counter.at, total.at), "overlap");
    demand(cudaDeviceSynchronize(), "overlap");
    same("overlap", total.at,
         std::vector<int32_t>(1, kBlocks * (kBlocks - 1) / 2 * (kThreads * (kThreads - 1) / 2)));
}

}  // namespace

int main() {
    check_mma();
    check_ldmatrix();
    check_dot4();
    check_words();
    check_exp2();
    check_loads();
    check_shared_loads();
    check_copies();
    check_shuffles();
    check_votes();
    check_counters();
    check_refusals();
    check_overlap();
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
