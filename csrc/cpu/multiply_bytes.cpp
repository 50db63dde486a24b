// A loop that does nothing but multiply bytes in registers: what a product of many rows is held against.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/threads.h"
#include "dqk/api.h"

namespace dqk {
namespace {

struct Loop {
    const char* instruction;
    int64_t products;    // of a block
    int64_t (*block)();  // their sum
};

#if defined(__x86_64__)
// A block: kSteps times kSums multiply-adds that do not wait for each other, on registers full of ones, so
// that their sum is the number of products. Sums of 16 bits hold a block: 1024 steps of 2.
constexpr int64_t kSteps = 1024;
constexpr int kSums = 12;

// The empty assembly says that x may be another now: no product is taken for the one before, and none is left
// out.
#define DQK_MULTIPLY_BLOCK(Vector, Word, kConstraint, kOnes, kZero, kMultiplyAdd) \
    Vector x = kOnes, sums[kSums];                                                \
    const Vector u = kOnes;                                                       \
    for (int j = 0; j < kSums; ++j) sums[j] = kZero;                              \
    for (int64_t i = 0; i < kSteps; ++i) {                                        \
        _Pragma("GCC unroll 12") for (int j = 0; j < kSums; ++j) {                \
            __asm__ volatile("" : kConstraint(x));                                \
            sums[j] = kMultiplyAdd(sums[j], u, x);                                \
        }                                                                         \
    }                                                                             \
    alignas(64) Word words[kSums * sizeof(Vector) / sizeof(Word)];                \
    __builtin_memcpy(words, sums, sizeof words);                                  \
    int64_t sum = 0;                                                              \
    for (const Word word : words) sum += word;                                    \
    return sum;

#if defined(DQK_AVX512_MODEL)  // tests/sim/avx512_model.h: no register holds a vector of 512 bits
#define DQK_HELD "+m"
#else
#define DQK_HELD "+v"
#endif
#define DQK_MADD(sum, u, x) _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, x))

// clang-format off
__attribute__((target("avx2"))) int64_t block_avx2() {
    DQK_MULTIPLY_BLOCK(__m256i, int16_t, "+x", _mm256_set1_epi8(1), _mm256_setzero_si256(), DQK_MADD)
}
__attribute__((target("avx2,avxvnni"))) int64_t block_avx_vnni() {
    DQK_MULTIPLY_BLOCK(__m256i, int32_t, "+x", _mm256_set1_epi8(1), _mm256_setzero_si256(), _mm256_dpbusd_avx_epi32)
}
__attribute__((target("avx512f,avx512bw,avx512vnni"))) int64_t block_avx512_vnni() {
    DQK_MULTIPLY_BLOCK(__m512i, int32_t, DQK_HELD, _mm512_set1_epi8(1), _mm512_setzero_si512(), _mm512_dpbusd_epi32)
}
// clang-format on
#endif

// Of the set that kernels run with; no instruction where there is no loop for it.
Status loop_of_isa(Loop* loop) {
    Isa isa = Isa::scalar;
    const Status chosen = active_isa(&isa);
    if (chosen != Status::ok) return chosen;
    *loop = {nullptr, 0, nullptr};
#if defined(__x86_64__)
    const int64_t steps = kSteps * kSums;
    if (isa == Isa::avx2) *loop = {"vpmaddubsw, 256 bits", 32 * steps, block_avx2};
    if (isa == Isa::avx_vnni) *loop = {"vpdpbusd, 256 bits", 32 * steps, block_avx_vnni};
    if (isa == Isa::avx512_vnni) *loop = {"vpdpbusd, 512 bits", 64 * steps, block_avx512_vnni};
#endif
    return Status::ok;
}

}  // namespace

const char* multiply_instruction() {
    Loop loop;
    return loop_of_isa(&loop) == Status::ok ? loop.instruction : nullptr;
}

Status multiply_bytes(int64_t products, int32_t threads, int64_t* sum) {
    if (products < 0) return Status::bad_size;
    Loop loop;
    const Status chosen = loop_of_isa(&loop);
    if (chosen != Status::ok) return chosen;
    if (loop.block == nullptr) return Status::bad_kernel;
    const int64_t blocks = (products + loop.products - 1) / loop.products;
    constexpr int64_t kMaxTasks = 256;
    int64_t tasks = threads < 1 ? 1 : threads > kMaxTasks ? kMaxTasks : threads;
    if (tasks > blocks) tasks = blocks;
    int64_t sums[kMaxTasks] = {};
    parallel_for(tasks, threads, [&](int64_t task) {
        const int64_t end = blocks * (task + 1) / tasks;
        for (int64_t i = blocks * task / tasks; i < end; ++i) sums[task] += loop.block();
    });
    *sum = 0;
    for (int64_t task = 0; task < tasks; ++task) *sum += sums[task];
    return Status::ok;
}

}  // namespace dqk
